"""How the native kernel is found, compiled and done without."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.layers import random_layer, random_routing
from tests.paths import ROOT
from vllm_moeq.format import UsageError
from vllm_moeq.kernels import choose, make_layer
from vllm_moeq.kernels.cpu import build

pytestmark = pytest.mark.compiler


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing remembered before or after."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.problem.cache_clear()
    yield tmp_path
    build.problem.cache_clear()


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("Error building extension\nand many lines of a compiler")


@pytest.mark.skipif(platform.machine() not in build.MACHINES, reason="the kernel is for x86")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_it_can_be_built_here() -> None:
    """Other tests are skipped where it cannot; a mistake in the sources must not pass for that."""
    assert build.problem() == ""


@pytest.mark.usefixtures("unbuilt")
def test_without_a_compiler_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.load", fails)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    packed = random_layer([3, 1], 64, 32, 32)
    with caplog.at_level(logging.WARNING, "vllm.moeq"):
        choice = choose(packed)
        kernel = make_layer(packed, torch.bfloat16)
    assert (choice.backend, kernel.name) == ("reference", "reference")
    assert choice.reason == "the native kernel could not be built: Error building extension"
    assert len({id(record) for record in caplog.records}) == 1  # handlers may stand at two loggers
    assert "reference kernel, which is slow, takes its place" in caplog.text
    weights, ids = random_routing(3, 2, 1)
    assert kernel(torch.ones(3, 64), weights, ids).isfinite().all()
    with pytest.raises(UsageError, match="VLLM_MOEQ_BACKEND=native: the native kernel could not be built"):
        choose(packed, "native")


def test_a_real_compiler_that_fails(tmp_path: Path) -> None:
    script = """
import torch
from tests.kernels.layers import random_layer
from vllm_moeq.kernels import choose
print(choose(random_layer([3], 64, 32, 32)))
"""
    environment = {**os.environ, "CXX": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.returncode == 0, found.stderr
    assert "Choice(backend='reference'" in found.stdout
    assert "the native kernel could not be built" in found.stdout
    assert found.stderr.count("takes its place") == 1


@pytest.mark.usefixtures("unbuilt")
def test_another_kind_of_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert choose(random_layer([3], 64, 32, 32)).reason == "the native kernel is for x86, not riscv64"


def test_the_lock_of_a_killed_process_is_no_obstacle(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, *_: object, build_directory: str, **__: object) -> None:
        assert not Path(build_directory, "lock").exists()
        calls.append(name)
        Path(build_directory, f"{name}.so").touch()

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    folder = unbuilt / f"moeq_native_{build.fingerprint()}"
    folder.mkdir()
    (folder / "lock").touch()
    library = build.compile_once()
    assert library.exists()
    assert build.compile_once() == library
    assert len(calls) == 1, "compiled twice"
    library.unlink()
    build.compile_once()
    assert len(calls) == 2, "a library that is gone is compiled again"


def test_a_wheel_s_library_is_taken_for_its_torch_only(tmp_path: Path) -> None:
    assert build.prebuilt(tmp_path) is None
    (tmp_path / "_native_torch1_0.abi3.so").touch()
    assert build.prebuilt(tmp_path) is None
    ours = tmp_path / f"{build.module_name()}.cpython-311-x86_64-linux-gnu.so"
    ours.touch()
    assert build.prebuilt(tmp_path) == ours


def test_ninja_need_not_be_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with build._ninja_on_path():
        assert str(Path(sys.executable).parent) in os.environ["PATH"].split(os.pathsep)
    assert os.environ["PATH"] == "/nowhere"

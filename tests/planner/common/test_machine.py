"""What ``moeq env`` tells of a machine, and what it never tells."""

from __future__ import annotations

import getpass
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from planner.common import machine
from planner.common.machine import describe_machine, kernels, processor, system, versions, without_paths
from tests.conftest import Outcome
from tests.kernels.layers import random_layer
from vllm_moeq import __version__
from vllm_moeq.kernels import TABLE, VARIABLE, choose
from vllm_moeq.kernels.cpu.layer import ISA_VARIABLE, instruction_sets

CPU = torch.device("cpu")
Moeq = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, ISA_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_versions_are_those_of_the_packages() -> None:
    found = versions()
    assert (found["vllm-moeq"], found["python"]) == (__version__, platform.python_version())
    assert found["transformers"] == version("transformers")
    assert found["humming-kernels"] is None, "what is not installed has no version"


def test_the_kernel_is_the_one_that_a_layer_gets() -> None:
    found = kernels(CPU)
    assert found["chosen"] == choose(random_layer([3, 1], 128, 64, 64)).backend
    assert found["others"].keys() == {row.name for row in TABLE} - {found["chosen"]}
    assert "needs the package humming-kernels" in found["others"]["humming"]


@pytest.mark.parametrize(
    ("requested", "chosen", "reason"),
    [
        ("reference", "reference", "VLLM_MOEQ_BACKEND asks for it"),
        ("humming", None, "VLLM_MOEQ_BACKEND=humming: the humming kernel needs the package humming-kernels"),
        (
            "/srv/secret",
            None,
            "VLLM_MOEQ_BACKEND: expected one of auto, triton, humming, native, reference, found PATH",
        ),
    ],
)
def test_a_variable_chooses(monkeypatch: pytest.MonkeyPatch, requested: str, chosen: str | None, reason: str) -> None:
    monkeypatch.setenv(VARIABLE, requested)
    found = kernels(CPU)
    assert found["chosen"] == chosen
    assert found["reason"].startswith(reason)


@pytest.mark.skipif(not instruction_sets(), reason="the native kernel is not there")
def test_the_instruction_set_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels(CPU)["instruction_set"] == instruction_sets()[-1]
    monkeypatch.setenv(ISA_VARIABLE, "scalar")
    assert kernels(CPU)["instruction_set"] == "scalar"
    monkeypatch.setenv(ISA_VARIABLE, "sse")
    assert kernels(CPU)["instruction_set"].startswith("VLLM_MOEQ_CPU_ISA: expected one of scalar")


def test_a_kernel_that_breaks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_device: torch.device) -> str:
        raise ImportError("libcuda.so.1: cannot open /home/somebody/lib/libcuda.so.1\nand more")

    rows = [replace(row, problem=broken) if row.name == "triton" else row for row in TABLE]
    monkeypatch.setattr(machine, "TABLE", rows)
    assert kernels(CPU)["others"]["triton"] == "ImportError: libcuda.so.1: cannot open PATH"


def test_parts_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "PROCESSORS", tmp_path / "none")
    assert system()["compiler"] is None
    assert processor()["instructions"] == []


def test_nothing_names_the_machine_or_its_user(moeq: Moeq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOEQ_BACKEND", "native")
    monkeypatch.setenv("VLLM_MOEQ_OTHER", f"{Path.home()}/models")
    monkeypatch.setenv("SECRET_TOKEN", "hf_very_secret")
    for flags in ((), ("--json",)):
        outcome = moeq("env", *flags)
        assert (outcome.code, outcome.err) == (0, "")
        for private in (
            platform.node(),
            str(Path.home()),
            os.getcwd(),
            "hf_very_secret",
            "SECRET",
            f"/{getpass.getuser()}",
        ):
            assert private not in outcome.out
        assert "VLLM_MOEQ_OTHER" in outcome.out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[Errno 30] Read-only file system: '/root/.cache/torch'", "[Errno 30] Read-only file system: 'PATH'"),
        ("~/cache is full", "PATH is full"),
        ("open '/home/some body/x y.so': no", "open 'PATH': no"),
        ("c++ -I/home/somebody/include -L/opt/lib --to=/srv/x", "c++ -IPATH -LPATH --to=PATH"),
        ("CUDA/HIP 12.4, 3/4 of it", "CUDA/HIP 12.4, 3/4 of it"),
    ],
)
def test_paths_are_left_out(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_lines_for_people(moeq: Moeq) -> None:
    lines = dict(line.split(": ", 1) for line in moeq("env").out.splitlines())
    assert lines["vllm-moeq"] == __version__
    assert {"python", "torch", "system", "compiler", "processor", "memory", "GPU", "kernel"} <= lines.keys()


@pytest.mark.slow
def test_the_command(moeq_process: Moeq) -> None:
    outcome = moeq_process("env", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert found.keys() == describe_machine().keys()
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpus_are_named() -> None:
    (first, *_) = machine.gpus()
    assert first["name"] == torch.cuda.get_device_name(0)
    assert first["memory_bytes"] > 2**30

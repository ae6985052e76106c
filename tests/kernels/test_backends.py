from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.layers import exact, random_layer, random_routing
from vllm_moeq.format import UsageError
from vllm_moeq.kernels import PackedExperts, make_layer
from vllm_moeq.kernels.backends import Measurement, choose, read_measurements
from vllm_moeq.kernels.cpu import build


@pytest.fixture
def packed() -> PackedExperts:
    return random_layer([3, 1, 2], 128, 64, 64)


class FakeGpu:
    """Pretend that tensors lie on a GPU of this name; nothing is launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, packed: PackedExperts, name: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        on_gpu = type("Words", (), {"device": torch.device("cuda")})()
        object.__setattr__(packed.gate_up, "words", on_gpu)


@pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there")
def test_a_cpu_gets_the_native_kernel(packed: PackedExperts) -> None:
    assert choose(packed).backend == "native"
    assert choose(packed, "reference").backend == "reference"
    assert make_layer(packed, torch.float32).name == "native"


def test_a_gpu_gets_triton_unless_something_else_was_measured(
    packed: PackedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch, packed, "NVIDIA Test")
    row = Measurement("NVIDIA Test", 3, 128, 64, (1, 2, 3), "humming")
    assert choose(packed, measurements=[]).backend == "triton"
    assert choose(packed, measurements=[row]).backend == "humming"
    for change in ({"gpu": "NVIDIA Other"}, {"hidden": 256}, {"widths": (1, 2)}, {"experts": 4}):
        other = Measurement(**{**row.__dict__, **change})
        assert choose(packed, measurements=[other]).backend == "triton"


def test_an_unknown_backend_is_refused(packed: PackedExperts) -> None:
    with pytest.raises(UsageError, match=r"VLLM_MOEQ_BACKEND: expected one of auto, triton.*found cutlass"):
        choose(packed, "cutlass")


def test_humming_without_a_gpu_is_refused(packed: PackedExperts) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="humming"):
        make_layer(packed, torch.float16, "humming")


def test_triton_without_gpu_or_interpreter_is_refused() -> None:
    """In its own process: this one has the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = """
import torch
from tests.kernels.layers import random_layer
from vllm_moeq.format import UsageError
from vllm_moeq.kernels import make_layer
try:
    make_layer(random_layer([3], 64, 32, 32), torch.float16, "triton")
except UsageError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=root, env=environment
    )
    assert result.stdout.strip() == "VLLM_MOEQ_BACKEND=triton: expected a GPU and the triton package, found device cpu"


def test_float32_activations_are_refused(packed: PackedExperts) -> None:
    with pytest.raises(UsageError, match=r"--dtype: the triton kernels take float16 or bfloat16, found torch\.float32"):
        make_layer(packed, torch.float32, "triton")


@pytest.mark.parametrize("backend", ["reference", "triton", "native"])
def test_backends_agree(packed: PackedExperts, backend: str) -> None:
    if backend == "native" and build.problem():
        pytest.skip(build.problem())
    layer = make_layer(packed, torch.float16, backend)
    assert layer.name == backend
    weights, ids = random_routing(5, 3, 2)
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(0)).half()
    expected = exact(packed, x, weights, ids)
    assert (layer(x, weights, ids).double() - expected).norm() < 2e-3 * expected.norm()


def test_measurements_are_read_from_a_file(tmp_path: Path) -> None:
    assert read_measurements(tmp_path / "missing.json") == []
    row = {"gpu": "G", "experts": 8, "hidden": 64, "intermediate": 32, "widths": [2, 3], "backend": "triton"}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps([row]))
    assert read_measurements(path) == [Measurement("G", 8, 64, 32, (2, 3), "triton")]

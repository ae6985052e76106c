from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.layers import exact, random_layer, random_routing
from vllm_moeq.format import PACKED, UsageError
from vllm_moeq.kernels import PackedExperts, make_layer
from vllm_moeq.kernels.backends import choose
from vllm_moeq.kernels.cpu import build


@pytest.fixture
def packed() -> PackedExperts:
    return random_layer([3, 1, 2], 128, 64, 64)


def pretend_on_gpu(packed: PackedExperts) -> None:
    """Let the words look as if they lay on a GPU; nothing is launched."""
    packed.gate_up.tensors[PACKED] = type("Words", (), {"device": torch.device("cuda")})()


@pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there")
def test_a_cpu_gets_the_native_kernel(packed: PackedExperts) -> None:
    assert choose(packed).backend == "native"
    assert choose(packed, "reference").backend == "reference"
    assert make_layer(packed, torch.float32).name == "native"


def test_a_gpu_gets_triton(packed: PackedExperts) -> None:
    pretend_on_gpu(packed)
    assert choose(packed).backend == "triton"


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
from vllm_moeq.format import PACKED, UsageError
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

"""Linears that vLLM has no CPU kernel for: packed in the native kernel, or unpacked."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from vllm_moeq.format import PACKED, Linear, UsageError, linear_values
from vllm_moeq.kernels import VARIABLE
from vllm_moeq.kernels.cpu import build

pytestmark = pytest.mark.compiler

ROWS, COLUMNS, GROUP = 48, 128, 64


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's parameters be made without a server's process groups."""
    parameter = pytest.importorskip("vllm.model_executor.parameter")
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def loaded(method: Any, bits: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a layer as vLLM loads it, and what it stands for."""
    layer = torch.nn.Module()
    method.create_weights(layer, COLUMNS, [32, 16], COLUMNS, ROWS, torch.float32, weight_loader=None)
    generator = torch.Generator().manual_seed(bits)
    packed, scale = layer.get_parameter("weight_packed"), layer.get_parameter("weight_scale")
    words = torch.randint(-(2**31), 2**31, packed.shape, generator=generator).int()
    packed.data.copy_(words)
    scale.data.copy_(torch.rand(scale.shape, generator=generator))
    expected = linear_values(words, scale.data, bits)
    method.process_weights_after_loading(layer)
    return layer, expected


@pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there")
@pytest.mark.parametrize("bits", [4, 8])
def test_both_ways_multiply_alike(bits: Literal[4, 8], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_moeq.serving.linear_method import choose_method

    x, bias = torch.randn((2, 5, COLUMNS), generator=torch.Generator().manual_seed(0)), torch.arange(float(ROWS))
    native = choose_method(Linear(bits=bits, group_size=GROUP), "it", "for a test")
    monkeypatch.setenv(VARIABLE, "reference")
    other = choose_method(Linear(bits=bits, group_size=GROUP), "it", "for a test")
    assert [type(each).__name__ for each in (native, other)] == ["NativeLinearMethod", "UnpackedLinearMethod"]
    for method in (native, other):
        layer, dense = loaded(method, bits)
        found = method.apply(layer, x, bias)
        assert torch.allclose(found, x @ dense.T + bias, rtol=1e-4, atol=1e-3)
        if method is native:
            assert getattr(layer, PACKED).nbytes < dense.bfloat16().nbytes  # rows fill whole panels of 32
            assert [name for name, _ in layer.named_parameters()] == [PACKED]


def test_a_group_that_a_rank_would_split_is_named() -> None:
    from vllm_moeq.serving.linear_method import choose_method

    method = choose_method(Linear(bits=4, group_size=GROUP), "model.layers.0.self_attn.o_proj", "for a test")
    with pytest.raises(
        UsageError, match=r"o_proj: expected an input size per rank that is a multiple of .* 64, found 96"
    ):
        method.create_weights(torch.nn.Module(), 96, [32], 192, 32, torch.float32, weight_loader=None)

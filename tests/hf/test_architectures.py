"""Every architecture in transformers: the values of its dense export, in the memory of its packed tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.architectures import EXPERTS, TINY
from tests.hf.conftest import Pair, logits
from vllm_moeq.format import verify
from vllm_moeq.hf import RoutedExperts
from vllm_moeq.kernels.cpu.layer import NativeLayer

pytestmark = pytest.mark.compiler


def dtypes(model: Any, packed: Any) -> dict[str, torch.dtype]:
    """Return what both models have."""
    state = packed.state_dict()
    return {name: tensor.dtype for name, tensor in model.state_dict().items() if name in state}


def experts_of(model: Any) -> dict[str, RoutedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}


def test_float32_logits_are_those_of_the_dense_export(pair: Pair) -> None:
    """The exact comparison: in float32 no weight is rounded on either side, and only the order of sums differs.

    In bfloat16 a dense layer rounds between its matrix products where the reference kernel does not, and one token
    whose two best experts are close goes elsewhere.
    """
    packed, info = pair.kind.from_pretrained(pair.quantized, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    dense = pair.load("dense", torch.float32)
    assert dtypes(packed, packed) == dtypes(dense, packed)
    found, expected = logits(packed), logits(dense)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_bfloat16_experts_are_those_of_the_dense_export(pair: Pair) -> None:
    """Each MoE layer's experts on the inputs and the routing that they have in the model."""
    packed, dense = (pair.load(which, torch.bfloat16) for which in ("quantized", "dense"))
    assert dtypes(packed, packed) == dtypes(dense, packed)
    calls: dict[str, tuple[Any, torch.Tensor]] = {}
    for name, module in experts_of(packed).items():
        module.register_forward_hook(lambda _, inputs, output, name=name: calls.update({name: (inputs, output)}))
    found = logits(packed)
    assert len(calls) == TINY[pair.name].moe_layers
    with torch.no_grad():
        for name, (inputs, output) in calls.items():
            expected = dense.get_submodule(name)(*inputs)
            assert output.dtype == expected.dtype == torch.bfloat16
            assert (output.float() - expected.float()).norm() < 2**-7 * expected.float().norm()
    exact = logits(pair.load("dense", torch.float32))
    # The median, because rounding sends some tokens to other experts, in the dense model too.
    errors = [(model - exact).norm(dim=-1).median() for model in (found, logits(dense))]
    assert errors[0] < 2 * errors[1]


def test_experts_take_the_memory_of_their_packed_tensors(pair: Pair) -> None:
    packed = pair.load("quantized", torch.bfloat16)
    modules = experts_of(packed)
    assert len(modules) == TINY[pair.name].moe_layers
    size = sum(buffer.nbytes for module in modules.values() for buffer in module.buffers())
    kernels = [module._kernel for module in modules.values()]
    size += sum(kernel.nbytes for kernel in kernels if isinstance(kernel, NativeLayer))  # has taken the buffers over
    assert size == verify(pair.quantized, values=False).expert_bytes
    weights = sum(module.layer.weights for module in modules.values())
    assert 8 * size == weights * (27 / EXPERTS + 1)  # the mean width, and a scale and a zero per 32 weights
    assert not any(".experts." in name and not name.endswith("bias") for name, _ in packed.named_parameters())
    rest = sum(tensor.nbytes for name, tensor in packed.named_parameters() if ".experts." not in name)
    biases = sum(tensor.nbytes for name, tensor in packed.named_parameters() if ".experts." in name)
    assert packed.get_memory_footprint() < rest + biases + size + 2**16

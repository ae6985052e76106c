"""The MoE layer as one opaque operator, which torch.compile does not trace into."""

from __future__ import annotations

import torch

from vllm_moeq.format import SCHEMES, WHOLE_ROW, BlockRotation
from vllm_moeq.kernels.activations import Activation
from vllm_moeq.kernels.interface import PackedExperts, PackedMatrices
from vllm_moeq.kernels.ragged import ragged
from vllm_moeq.kernels.reference import moe_reference

_library = torch.library.Library("vllm_moeq", "FRAGMENT")


def _moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    signs: list[torch.Tensor],
    biases: list[torch.Tensor],
    bits: list[int],
    schemes: list[str],
    numbers: list[int],
    sizes: list[int],
    activation: list[float],
) -> torch.Tensor:
    """Run the reference on a layer that comes as tensors, numbers and names; see :func:`arguments`."""
    does = Activation.of(activation)
    intermediate, group_size, offset = numbers
    hidden, own = x.shape[1], [SCHEMES[name] for name in schemes]
    matrices = (
        ragged(bits, does.parts * intermediate, hidden, group_size, schemes=own),
        ragged(bits, hidden, intermediate, group_size, offset, own),
    )
    gate_up, down = (
        PackedMatrices(
            each, *buffers, rotation=BlockRotation(sign, size) if size else None, bias=bias if bias.numel() else None
        )
        for each, buffers, sign, size, bias in zip(matrices, (w13, w2), signs, sizes, biases, strict=True)
    )
    return moe_reference(x, topk_weights, topk_ids, PackedExperts(gate_up, down, does))


def _moe_shape(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


_library.define(
    "moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] w13, Tensor[] w2, Tensor[] signs, Tensor[] biases, "
    "int[] bits, str[] schemes, int[] numbers, int[] sizes, float[] activation) -> Tensor"
)
_library.impl("moe", _moe, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_moeq::moe", _moe_shape, lib=_library)


def moe(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, packed: PackedExperts) -> torch.Tensor:
    """Run a layer's experts on this rank's tokens.

    Args:
        x: hidden states [tokens, hidden].
        topk_weights: routing weights [tokens, top-k].
        topk_ids: local expert indices [tokens, top-k]; negative ones are skipped.
        packed: the layer.

    Returns:
        This rank's part of the sum, [tokens, hidden].
    """
    result: torch.Tensor = torch.ops.vllm_moeq.moe(x, topk_weights, topk_ids, *arguments(packed, x.new_empty(0)))
    return result


def arguments(packed: PackedExperts, nothing: torch.Tensor) -> tuple[object, ...]:
    """Return a layer as the operator takes it, with ``nothing`` for each tensor that it lacks."""
    both = (packed.gate_up, packed.down)
    first, second = (each.matrices for each in both)
    # They differ only if every row is one group, as long as the row.
    group_size = first.group_size if first.group_size == second.group_size else WHOLE_ROW
    return (
        *(list(each.tensors.values()) for each in both),
        [nothing if each.rotation is None else each.rotation.signs for each in both],
        [nothing if each.bias is None else each.bias for each in both],
        list(first.bits),
        [scheme.name for scheme in first.schemes],
        [second.columns, group_size, second.group_offset],
        [0 if each.rotation is None else each.rotation.size for each in both],
        packed.activation.numbers(),
    )

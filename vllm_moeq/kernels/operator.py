"""The MoE layer as one opaque operator, which torch.compile does not trace into."""

from __future__ import annotations

import torch

from vllm_moeq.format import SCHEMES, WHOLE_ROW, BlockRotation
from vllm_moeq.kernels.interface import PackedMatrices
from vllm_moeq.kernels.ragged import ragged
from vllm_moeq.kernels.reference import moe_reference

_library = torch.library.Library("vllm_moeq", "FRAGMENT")


def _moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    intermediate: int,
    bits: list[int],
    schemes: list[str],
    group_size: int,
    w2_group_offset: int,
    signs: list[torch.Tensor],
    sizes: list[int],
) -> torch.Tensor:
    hidden, own = x.shape[1], [SCHEMES[name] for name in schemes]
    first = ragged(bits, 2 * intermediate, hidden, group_size, schemes=own)
    second = ragged(bits, hidden, intermediate, group_size, w2_group_offset, own)
    rotations = [BlockRotation(part, size) if size else None for part, size in zip(signs, sizes, strict=True)]
    return moe_reference(x, topk_weights, topk_ids, first, w13, second, w2, (rotations[0], rotations[1]))


def _moe_shape(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


_library.define(
    "moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] w13, Tensor[] w2, int intermediate, int[] bits, "
    "str[] schemes, int group_size, int w2_group_offset, Tensor[] signs, int[] sizes) -> Tensor"
)
_library.impl("moe", _moe, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_moeq::moe", _moe_shape, lib=_library)


def moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: PackedMatrices,
    w2: PackedMatrices,
) -> torch.Tensor:
    """Run a layer's experts on this rank's tokens.

    Args:
        x: hidden states [tokens, hidden].
        topk_weights: routing weights [tokens, top-k].
        topk_ids: local expert indices [tokens, top-k]; negative ones are skipped.
        w13: gate and up [E, 2·intermediate, hidden], gate's rows first.
        w2: down [E, hidden, intermediate].

    Returns:
        This rank's part of the sum, [tokens, hidden].
    """
    first, second = w13.matrices, w2.matrices
    # They differ only if every row is one group, as long as the row.
    group_size = first.group_size if first.group_size == second.group_size else WHOLE_ROW
    rotations = (w13.rotation, w2.rotation)
    result: torch.Tensor = torch.ops.vllm_moeq.moe(
        x, topk_weights, topk_ids, list(w13.tensors.values()), list(w2.tensors.values()), second.columns,
        list(first.bits), [scheme.name for scheme in first.schemes], group_size, second.group_offset,
        [x.new_empty(0) if it is None else it.signs for it in rotations],
        [0 if it is None else it.size for it in rotations],
    )  # fmt: skip
    return result

"""The MoE layer as one opaque operator, which torch.compile does not trace into."""

from __future__ import annotations

import torch

from vllm_moeq.kernels.ragged import ragged
from vllm_moeq.kernels.reference import moe_reference

_library = torch.library.Library("vllm_moeq", "FRAGMENT")


def _moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_words: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_zeros: torch.Tensor,
    w2_words: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_zeros: torch.Tensor,
    bits: list[int],
    group_size: int,
    w2_group_offset: int,
) -> torch.Tensor:
    hidden = x.shape[1]
    rows = w13_scales.shape[1]
    w13 = ragged(bits, rows, hidden, group_size)
    w2 = ragged(bits, hidden, rows // 2, group_size, w2_group_offset)
    gate_up, down = (w13_words, w13_scales, w13_zeros), (w2_words, w2_scales, w2_zeros)
    return moe_reference(x, topk_weights, topk_ids, w13, gate_up, w2, down)


def _moe_shape(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


_library.define(
    "moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_words, Tensor w13_scales, Tensor w13_zeros, "
    "Tensor w2_words, Tensor w2_scales, Tensor w2_zeros, int[] bits, int group_size, int w2_group_offset) -> Tensor"
)
_library.impl("moe", _moe, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_moeq::moe", _moe_shape, lib=_library)


def moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bits: list[int],
    group_size: int,
    w2_group_offset: int = 0,
) -> torch.Tensor:
    """Run a layer's experts on this rank's tokens.

    Args:
        x: hidden states [tokens, hidden].
        topk_weights: routing weights [tokens, top-k].
        topk_ids: local expert indices [tokens, top-k]; negative ones are skipped.
        w13: gate's and up's words (1-D int32), scales and zeros [E, 2·intermediate, groups].
        w2: down's words, scales and zeros [E, hidden, groups].
        bits: the width of each local expert.
        group_size: weights per scale, or −1 for whole rows.
        w2_group_offset: the position within a group at which this rank's slice of the intermediate dimension begins.

    Returns:
        This rank's part of the sum, [tokens, hidden].
    """
    result: torch.Tensor = torch.ops.vllm_moeq.moe(
        x, topk_weights, topk_ids, *w13, *w2, bits, group_size, w2_group_offset
    )
    return result

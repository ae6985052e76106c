"""Skipping the experts that a token's router hardly wants."""

from __future__ import annotations

import torch


def drop_weak(ids: torch.Tensor, weights: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop each token's experts whose weight is below ``threshold`` times the token's largest.

    The other weights grow by one factor per token, so that their sum is what it was. The largest weight
    is never dropped. This is the rule of ODP (MC-MoE, Huang et al., 2025), there for two experts per
    token, without its protection of important tokens.

    Only elementwise operations and sums over a token's experts: nothing waits for a device, and
    torch.compile and CUDA graphs take it.

    Args:
        ids: [tokens, k] expert indices, any signed integer dtype; slots with a negative one are empty.
        weights: [tokens, k] routing weights, not negative, any float dtype; those of empty slots do not count.
        threshold: 0 (drops nothing) to 1 (keeps only what equals the largest).

    Returns:
        New tensors of the same shapes and dtypes. Dropped slots have the id −1 and the weight 0; empty
        slots, and tokens of which nothing is dropped, are as they were.

    Raises:
        ValueError: a threshold outside 0 … 1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold from 0 to 1, found {threshold}")
    # Half precision would round the sums, and the products that are compared.
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    present = ids >= 0
    counted = torch.where(present, wide, 0.0)
    weak = present & (counted < threshold * counted.amax(dim=-1, keepdim=True))
    kept = torch.where(weak, 0.0, counted)
    factor = counted.sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True)
    # Elsewhere the factor is 1, or NaN where all weights are 0.
    changed = present & weak.any(dim=-1, keepdim=True)
    result = torch.where(weak, 0.0, torch.where(changed, wide * factor, wide))
    return torch.where(weak, -1, ids), result.to(weights.dtype)

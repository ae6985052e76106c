"""Skip experts with a small routing weight."""

from __future__ import annotations

import torch


def drop_weak(ids: torch.Tensor, weights: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop each token's experts whose weight is below ``threshold`` times the token's largest.

    The token's other weights are multiplied by one factor that keeps their sum. The largest weight is never dropped.
    This is the rule of ODP (MC-MoE, Huang et al., 2025) without its protection of important tokens. ODP has two
    experts per token; here any number will do.

    The function never waits for the device, so torch.compile and CUDA graphs can capture it.

    Args:
        ids: expert indices [tokens, k], any signed integer dtype; a slot with a negative index is empty.
        weights: routing weights [tokens, k], not negative, any float dtype; the weights of empty slots are ignored.
        threshold: a number from 0 (drops nothing) to 1 (keeps only weights equal to the largest).

    Returns:
        New ids and weights of the same shapes and dtypes. A dropped slot has the id −1 and the weight 0. Empty slots,
        and tokens that lose no expert, are unchanged.

    Raises:
        ValueError: the threshold is outside 0 … 1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold from 0 to 1, found {threshold}")
    # In half precision the sums and the compared products would be rounded.
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    present = ids >= 0
    counted = torch.where(present, wide, 0.0)
    weak = present & (counted < threshold * counted.amax(dim=-1, keepdim=True))
    kept = torch.where(weak, 0.0, counted)
    factor = counted.sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True)
    # For all other tokens the factor is 1, or NaN if all their weights are 0.
    changed = present & weak.any(dim=-1, keepdim=True)
    result = torch.where(weak, 0.0, torch.where(changed, wide * factor, wide))
    return torch.where(weak, -1, ids), result.to(weights.dtype)

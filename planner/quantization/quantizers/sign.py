"""One bit: the sign times the mean magnitude of each group."""

from __future__ import annotations

import torch

from planner.quantization.quantizers.base import Quantized, finish, to_groups


def quantize_sign(weight: torch.Tensor, bits: int, group_size: int) -> Quantized:
    """Quantize [N, K] to w ≈ ±α with α = mean|w| per group, stored as scale 2α and zero point 0.5.

    Raises:
        ValueError: ``bits`` is not 1.
        CheckpointError: see :func:`planner.quantization.quantizers.base.to_groups`.
    """
    if bits != 1:
        raise ValueError(f"the sign quantizer has 1 bit, got {bits}")
    groups = to_groups(weight, group_size)
    scales = 2 * groups.abs().mean(dim=-1)
    result = finish(groups, scales, torch.full_like(scales, 0.5), bits)
    # Rounding would send a weight of (almost) 0 to −α, but by convention sign(0) is +. Groups of zeros keep the codes
    # of finish, which gave them another zero point.
    positive = (groups >= 0).flatten(1)
    signed = (result.zeros == 0.5).repeat_interleave(groups.shape[-1], dim=1)
    codes = torch.where(signed, positive, result.codes)
    return Quantized(codes.to(torch.uint8), result.scales, result.zeros, bits)

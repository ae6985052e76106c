"""Round to nearest (paper, eq. 2): 2^b equally spaced levels over the range of each group, integer zero point."""

from __future__ import annotations

import torch

from planner.quantization.quantizers.base import Quantized, ZeroPoints, finish, group_range, to_groups


def quantize_rtn(weight: torch.Tensor, bits: int, group_size: int, zero_points: ZeroPoints = "float") -> Quantized:
    """Quantize [N, K] without calibration.

    Δ = (max − min)/(2^b − 1), zero = −round(min/Δ). This is eq. 2 with codes from 0 instead of −2^(b−1). The zero point
    is always rounded; ``zero_points="integer"`` also makes it a code.

    Raises:
        CheckpointError: see :func:`planner.quantization.quantizers.base.to_groups`.
    """
    groups = to_groups(weight, group_size)
    low, high = group_range(groups, zero_points)
    scales = (high - low) / (2**bits - 1)
    zeros = -torch.round(low / torch.where(scales == 0, torch.ones_like(scales), scales))
    return finish(groups, scales, zeros, bits)

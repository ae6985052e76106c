"""Half-quadratic quantization (Badri & Shaji, 2023): find the zero point that minimises an lp error, p < 1."""

from __future__ import annotations

import torch

from planner.quantization.quantizers.base import Quantized, ZeroPoints, finish, group_range, to_groups

NORM = 0.7
BETA = 10.0
ITERATIONS = 20
BLOCK_WEIGHTS = 1 << 17
"""Number of weights that are optimized at a time. Their float32 temporaries stay in the cache."""


def quantize_hqq(weight: torch.Tensor, bits: int, group_size: int, zero_points: ZeroPoints = "float") -> Quantized:
    """Quantize [N, K] without calibration, a block of rows at a time.

    The scale is fixed at (max − min)/(2^b − 1). The loop alternates between the shrunken residual
    W_e = shrink(W − W_r) and the zero point that fits W − W_e. It stops when mean|W − W_r| of the block no longer
    falls. Integer zero points are rounded after every step.

    Raises:
        CheckpointError: see :func:`planner.quantization.quantizers.base.to_groups`.
    """
    groups = to_groups(weight, group_size)
    rows = max(1, BLOCK_WEIGHTS // weight.shape[1])
    fitted = [_fit(block, 2**bits - 1, bits == 4, zero_points) for block in groups.split(rows)]
    scales, zeros = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return finish(groups, scales, zeros, bits)


def _fit(
    groups: torch.Tensor, steps: int, round_first: bool, zero_points: ZeroPoints
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points, [rows, groups] each, of one block [rows, groups, G]."""
    low, high = (edge[..., None] for edge in group_range(groups, zero_points))
    scales = (high - low) / steps
    inverse = torch.where(scales == 0, torch.ones_like(scales), 1 / scales)
    zeros = -low * inverse
    if round_first or zero_points == "integer":
        zeros = torch.round(zeros)  # as the reference implementation does at this width
    scaled = groups * inverse
    best, lowest = zeros, float("inf")
    for _ in range(ITERATIONS):
        codes = (scaled + zeros).round_().clamp_(0, steps)
        residual = (codes - zeros).mul_(scales).neg_().add_(groups)
        error = float(residual.abs().mean())
        if not error < lowest:
            break
        lowest, best = error, zeros
        # This is mean(codes − (W − W_e) / s); W / s is already in ``scaled``.
        zeros = (codes.sub_(scaled) + _shrink_(residual).mul_(inverse)).mean(dim=-1, keepdim=True)
        if zero_points == "integer":
            zeros = zeros.round_().clamp_(0, steps)
    return scales[..., 0], best[..., 0]


def _shrink_(residual: torch.Tensor) -> torch.Tensor:
    """Take the proximal step of the lp norm in place: sign(x) · max(|x| − |x|^(p−1)/β, 0)."""
    magnitude = residual.abs()
    threshold = magnitude.log().mul_(NORM - 1).exp_().div_(BETA)  # |x|^(p−1); pow takes four times as long
    return residual.sign_().mul_(magnitude.sub_(threshold).clamp_min_(0))

"""Half-quadratic quantization (Badri & Shaji, 2023): a float zero point that minimises an lp error, p < 1."""

from __future__ import annotations

import torch

from planner.quantizers.base import Quantized, finish, to_groups

NORM = 0.7
BETA = 10.0
ITERATIONS = 20


def quantize_hqq(weight: torch.Tensor, bits: int, group_size: int) -> Quantized:
    """Quantize [N, K] without calibration.

    Alternates between the shrunken residual W_e = shrink(W − W_r) and the zero point that fits
    W − W_e, at a fixed scale (max − min)/(2^b − 1), and stops when mean|W − W_r| no longer falls.

    Raises:
        CheckpointError: see :func:`planner.quantizers.base.to_groups`.
    """
    groups = to_groups(weight, group_size)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    steps = 2**bits - 1
    scales = (high - low) / steps
    inverse = torch.where(scales == 0, torch.ones_like(scales), 1 / scales)
    zeros = -low * inverse
    if bits == 4:
        zeros = torch.round(zeros)  # as the reference implementation does at this width
    best = zeros
    lowest = float("inf")
    for _ in range(ITERATIONS):
        codes = torch.round(groups * inverse + zeros).clamp_(0, steps)
        residual = groups - (codes - zeros) * scales
        error = float(residual.abs().mean())
        if not error < lowest:
            break
        lowest, best = error, zeros
        zeros = (codes - (groups - _shrink(residual)) * inverse).mean(dim=-1, keepdim=True)
    return finish(groups, scales[..., 0], best[..., 0], bits)


def _shrink(residual: torch.Tensor) -> torch.Tensor:
    """Proximal step of the lp norm: sign(x) · max(|x| − |x|^(p−1)/β, 0)."""
    magnitude = residual.abs()
    return residual.sign() * (magnitude - magnitude.pow(NORM - 1) / BETA).clamp_min_(0)

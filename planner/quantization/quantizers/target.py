"""Asymmetric calibration: aim at what the original layer gives for the original model's inputs.

A layer behind quantized layers gets other inputs x than in the original model, o. Plain GPTQ keeps W·x, so that the
errors of earlier layers stay. Here the weights W* that bring W*·x closest to W·o are quantized instead:
W* = (W·O·Xᵀ + λW)·(X·Xᵀ + λI)⁻¹ = W + W·(O − X)·Xᵀ·(X·Xᵀ + λI)⁻¹ minimizes ‖W*·X − W·O‖² + λ‖W* − W‖².
"""

from __future__ import annotations

import torch

from planner.quantization.quantizers.hessian import Factor

SHIFT_COPIES = 1
"""Number of tensors of the Hessians' size in memory besides theirs: the shifts."""


def corrected(weights: torch.Tensor, shifts: torch.Tensor, factor: Factor, order: torch.Tensor) -> torch.Tensor:
    """Return W* [B, N, K] in float32, columns in the order of ``weights``.

    Args:
        weights: W, float [B, N, K].
        shifts: mean of (o − x)·xᵀ, float32 [B, K, K].
        factor: factors of the damped mean of x·xᵀ, whose columns are in the order ``order``.
        order: int64 [B, K].
    """
    original = weights.float()
    index = order[:, None, :].expand_as(original)
    due = (original @ shifts).gather(2, index)
    # X·(I + U)·diag(d)·(I + U)ᵀ = due
    unit = factor.feedback
    due = torch.linalg.solve_triangular(unit.mT, due, upper=False, left=False, unitriangular=True)
    due.div_(factor.cost[:, None])
    due = torch.linalg.solve_triangular(unit, due, upper=True, left=False, unitriangular=True)
    return torch.empty_like(original).scatter_(2, index, due).add_(original)

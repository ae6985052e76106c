"""Asymmetric calibration: aim at what the original layer gives for the original model's inputs.

A layer behind quantized layers gets other inputs x than in the original model, o. Plain GPTQ keeps W·x, so that the
errors of earlier layers stay. Here the weights W* that bring W*·x closest to an aim y are quantized instead:
W* = W + (Y − W·X)·Xᵀ·(X·Xᵀ + λI)⁻¹ minimizes ‖W*·X − Y‖² + λ‖W* − W‖². The aim is W·o, plus what the layer's output
has lost elsewhere and this matrix can make up for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planner.quantization.quantizers.hessian import Factor

SHIFT_COPIES = 1
"""Number of tensors of the Hessians' size in memory besides theirs: the shifts."""


@dataclass(frozen=True)
class Aim:
    """How far the outputs of matrices are from their aims: the mean of (y − W·x)·xᵀ is W·shift + lost.

    Attributes:
        shift: mean of (o − x)·xᵀ, float32 [B, K, K], with x the inputs and o the original model's for the same tokens.
        lost: mean of (y − W·o)·xᵀ, float32 [B, N, K]; None if the aim y is W·o.
    """

    shift: torch.Tensor
    lost: torch.Tensor | None = None

    def due(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the mean of (y − W·x)·xᵀ for weights W, float32 [B, N, K]."""
        return weights @ self.shift if self.lost is None else torch.baddbmm(self.lost, weights, self.shift)


def corrected(weights: torch.Tensor, aim: Aim, factor: Factor, order: torch.Tensor) -> torch.Tensor:
    """Return W* [B, N, K] in float32, columns in the order of ``weights``.

    Args:
        weights: W, float [B, N, K].
        aim: how far W·x is from its aim.
        factor: factors of the damped mean of x·xᵀ, whose columns are in the order ``order``.
        order: int64 [B, K].
    """
    original = weights.float()
    index = order[:, None, :].expand_as(original)
    due = aim.due(original).gather(2, index)
    # X·(I + U)·diag(d)·(I + U)ᵀ = due
    unit = factor.feedback
    due = torch.linalg.solve_triangular(unit.mT, due, upper=False, left=False, unitriangular=True)
    due.div_(factor.cost[:, None])
    due = torch.linalg.solve_triangular(unit, due, upper=True, left=False, unitriangular=True)
    return torch.empty_like(original).scatter_(2, index, due).add_(original)

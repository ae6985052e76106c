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


def ahead(weights: torch.Tensor, aim: Aim, factor: Factor, order: torch.Tensor) -> torch.Tensor:
    """Return (I + U)ᵀ·(W* − W)ᵀ, float32 [B, K, N], columns of W in the order ``order``.

    GPTQ that begins with it beside W rounds as it would round W*: it is what the columns' own corrections and those of
    the columns before them come to.

    Args:
        weights: W, float [B, N, K].
        aim: how far W·x is from its aim.
        factor: factors of the damped mean of x·xᵀ, whose columns are in the order ``order``.
        order: int64 [B, K].
    """
    weights = weights.float()
    shift = aim.shift.gather(2, order[:, None, :].expand_as(aim.shift))
    if aim.lost is not None:
        lost = aim.lost.gather(2, order[:, None, :].expand_as(weights))
        return _halfway(torch.baddbmm(lost, weights, shift), factor)
    if weights.shape[1] > weights.shape[2]:  # the shifts have fewer rows than W·shift
        return _halfway(shift, factor) @ weights.mT
    return _halfway(weights @ shift, factor)


def _halfway(due: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Return (I + U)ᵀ·Xᵀ, float32 [B, K, rows], of the solution X of X·(I + U)·diag(d)·(I + U)ᵀ = due [B, rows, K]."""
    found: torch.Tensor = torch.linalg.solve_triangular(factor.feedback, due.mT, upper=True, unitriangular=True)
    return found.div_(factor.cost[:, :, None])


def corrected(weights: torch.Tensor, aim: Aim, factor: Factor, order: torch.Tensor) -> torch.Tensor:
    """Return W* [B, N, K] in float32, columns in the order of ``weights``; arguments as for :func:`ahead`."""
    original = weights.float()
    due = ahead(original, aim, factor, order).mT
    due = torch.linalg.solve_triangular(factor.feedback, due, upper=True, left=False, unitriangular=True)
    return torch.empty_like(original).scatter_(2, order[:, None, :].expand_as(original), due).add_(original)

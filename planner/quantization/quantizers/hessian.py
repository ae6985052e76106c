"""The second moments of a layer's inputs, in the order and the factored form that GPTQ consumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


class NotPositiveDefiniteError(Exception):
    """Second moments that no damping makes usable."""


ActOrder = Literal["none", "group", "full"]
"""Columns as they are; groups, and columns within each, by falling second moment; all columns by it."""

MAX_DAMPING = 1.0
"""Relative to the mean of the diagonal: beyond it nothing of the Hessian is left."""


@dataclass(frozen=True)
class Factor:
    """H + λI = (I + U) · diag(d) · (I + U)ᵀ with U strictly upper triangular.

    Attributes:
        feedback: U, float32 [B, K, K]; the diagonal and what lies below are not read.
        cost: d, float32 [B, K]: what a rounding error of 1 in a column adds to the squared output error.
        damping: λ over the mean of the diagonal, as it was needed, one per matrix.
    """

    feedback: torch.Tensor
    cost: torch.Tensor
    damping: list[float]


def column_order(diagonal: torch.Tensor, group_size: int, order: ActOrder) -> torch.Tensor:
    """Return the order in which columns are quantized, int64 [B, K].

    Args:
        diagonal: second moment of each input, [B, K].
        group_size: columns that share a scale.
        order: see :data:`ActOrder`. ``group`` keeps groups together, so that the stored format needs no
            index; ``full`` does not, and needs scales that are fixed beforehand.
    """
    batch, columns = diagonal.shape
    if order == "none":
        return torch.arange(columns, device=diagonal.device).expand(batch, columns)
    if order == "full":
        return diagonal.argsort(dim=1, descending=True, stable=True)
    groups = diagonal.reshape(batch, -1, group_size)
    inside = groups.argsort(dim=2, descending=True, stable=True)
    outside = groups.mean(dim=2).argsort(dim=1, descending=True, stable=True)
    absolute = inside + torch.arange(0, columns, group_size, device=diagonal.device)[None, :, None]
    return absolute.gather(1, outside[..., None].expand_as(absolute)).flatten(1)


def factorize(hessians: torch.Tensor, damping: float) -> Factor:
    """Factor damped Hessians, with ten times the damping wherever one is not positive definite.

    This is the L·D·Lᵀ form of GPTQ (Chee et al., 2023, theorem 6): one Cholesky factorization instead of
    an inverse between two.

    Args:
        hessians: float32 [B, K, K], symmetric, destroyed. Inputs that were always 0 get a diagonal of 1.
        damping: λ to begin with, relative to the mean of the diagonal.

    Raises:
        NotPositiveDefiniteError: not finite, or not positive definite with any damping.
    """
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean(dim=1)
    if not bool(torch.isfinite(mean).all()):
        raise NotPositiveDefiniteError("second moments of the inputs that are not finite")
    wanted = torch.full_like(mean, damping)
    diagonal += (wanted * mean)[:, None]
    # A Cholesky factor is lower triangular; of the reversed matrix it is the upper one that is wanted.
    lower, failed = torch.linalg.cholesky_ex(hessians.flip(1, 2))
    while bool(failed.any()):
        again = failed.nonzero()[:, 0]
        raised = wanted[again] * 10 if damping else torch.full_like(wanted[again], 1e-3)
        if bool((raised > MAX_DAMPING).any()):
            raise NotPositiveDefiniteError(
                f"second moments of the inputs, not positive definite at damping {MAX_DAMPING}"
            )
        diagonal[again] += ((raised - wanted[again]) * mean[again])[:, None]
        wanted[again] = raised
        damping = damping or 1e-3
        lower[again], failed[again] = torch.linalg.cholesky_ex(hessians[again].flip(1, 2))
    upper = lower.flip(1, 2)
    root = upper.diagonal(dim1=1, dim2=2).clone()
    return Factor(upper.div_(root[:, None, :]), root.square(), wanted.tolist())

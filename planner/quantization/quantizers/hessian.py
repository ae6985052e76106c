"""Order and factor the Hessians (second moments of a layer's inputs) for GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FACTOR_COPIES = 4
"""Number of tensors of the Hessians' size in memory: a batch of Hessians, and temporaries of their factorization."""


class NotPositiveDefiniteError(Exception):
    """A Hessian stays unusable with any damping."""


ActOrder = Literal["none", "group", "full"]
"""Order of the columns. ``none`` keeps it. ``group`` sorts the groups, and the columns within each group, by falling
second moment. ``full`` sorts all columns by it."""

MAX_DAMPING = 1.0
"""Largest damping, relative to the mean of the diagonal. With more, the Hessian would hardly count."""


@dataclass(frozen=True)
class Factor:
    """H + λI = (I + U) · diag(d) · (I + U)ᵀ with U strictly upper triangular.

    Attributes:
        feedback: U, float32 [B, K, K]; the diagonal and the entries below it are not used.
        cost: d, float32 [B, K]; a rounding error of 1 in a column adds d to the squared output error.
        damping: λ that was needed, relative to the mean of the diagonal, one per matrix.
    """

    feedback: torch.Tensor
    cost: torch.Tensor
    damping: list[float]


def column_order(diagonal: torch.Tensor, group_size: int, order: ActOrder) -> torch.Tensor:
    """Return the order in which columns are quantized, int64 [B, K].

    Args:
        diagonal: second moment of each input, [B, K].
        group_size: columns that share a scale.
        order: see :data:`ActOrder`. ``group`` keeps each group's columns together, so the stored format needs no
            index. ``full`` does not; it needs scales that are chosen beforehand.
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
    """Factor damped Hessians. If one is not positive definite, try again with ten times its damping.

    This is the L·D·Lᵀ form of GPTQ (Chee et al., 2023, theorem 6). It takes one Cholesky factorization; the usual form
    takes two and an inverse.

    Args:
        hessians: float32 [B, K, K], symmetric; overwritten. An input that was always 0 gets a diagonal of 1.
        damping: first λ to try, relative to the mean of the diagonal.

    Raises:
        NotPositiveDefiniteError: a Hessian is not finite, or not positive definite with any damping.
    """
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean(dim=1)
    if not bool(torch.isfinite(mean).all()):
        raise NotPositiveDefiniteError("second moments of the inputs that are not finite")
    wanted = torch.full_like(mean, damping)
    diagonal += (wanted * mean)[:, None]
    # Cholesky gives a lower triangular factor. Reversing the matrix and its factor gives the upper one that we need.
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

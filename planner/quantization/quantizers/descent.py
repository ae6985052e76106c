"""After GPTQ, lower the same error further: fit the levels to the codes, and round each column again.

GPTQ rounds a column when it does not know the errors of those that follow, and chooses a group's levels before its
codes. With all errors known, a column's best code and a group's best scale and zero point have closed forms. Taken in
turn, they never raise the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from planner.quantization.quantizers.base import MAX_ZERO, NARROWEST
from planner.quantization.quantizers.grid import LevelSearch
from planner.quantization.quantizers.hessian import Factor

LEAF = 16
"""Number of columns that are rounded one after the other, before their changes are passed on by a matrix product."""

LEAST_SPREAD = 1e-4
"""Groups whose codes hardly differ keep their levels: their slope is not known."""


@dataclass
class Rounded:
    """Matrices [B, K, N] rounded by GPTQ; codes, scales and zeros are overwritten.

    Attributes:
        residuals: (I + U)ᵀ·E of the errors E, weights minus rounded weights, float32 [B, K, N]: what each column was
            off by when it was rounded.
        codes: uint8 [B, K, N].
        scales: float32 [B, groups, N], of consecutive columns.
        zeros: zero points, float32 [B, groups, N].
        hessian: damped second moments H of the inputs, float32 [B, K, K].
        factor: H = (I + U)·diag(d)·(I + U)ᵀ.
        grids: the settings of the levels of each group; those of one bit stay as they are.
        dtype: stored dtype of scales and zero points.
    """

    residuals: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    hessian: torch.Tensor
    factor: Factor
    grids: Sequence[LevelSearch]
    dtype: torch.dtype

    def values(self) -> torch.Tensor:
        """Return the rounded weights, float32 [B, K, N]."""
        size = self.codes.shape[1] // len(self.grids)
        scales, zeros = (part.repeat_interleave(size, dim=1) for part in (self.scales, self.zeros))
        return (self.codes.float() - zeros) * scales


def descend(rounded: Rounded, sweeps: int) -> None:
    """Lower the error trace(Eᵀ·H·E) by passes over all groups."""
    size = rounded.codes.shape[1] // len(rounded.grids)
    slopes = rounded.residuals  # their place, group by group
    changes = torch.zeros_like(slopes)
    for sweep in range(sweeps):
        for group, grid in enumerate(rounded.grids):
            inside = slice(group * size, (group + 1) * size)
            if sweep == 0:
                slopes[:, inside] = _slope(rounded, inside)
            if grid.bits > 1:
                known = slice(None if sweep else inside.start)  # in the first pass, what follows has not changed
                slope = torch.baddbmm(slopes[:, inside], rounded.hessian[:, inside, known], changes[:, known], alpha=-1)
                changes[:, inside] += _improve(rounded, group, inside, slope)


def _slope(rounded: Rounded, inside: slice) -> torch.Tensor:
    """Return H·E in some columns: (I + U)·diag(d) times the residuals, of which no earlier columns are needed."""
    behind = slice(inside.start, None)
    unit = rounded.factor.feedback[:, inside, behind].triu(1)
    unit.diagonal(dim1=1, dim2=2).fill_(1)
    return (unit * rounded.factor.cost[:, None, behind]) @ rounded.residuals[:, behind]


def _improve(rounded: Rounded, group: int, inside: slice, slope: torch.Tensor) -> torch.Tensor:
    """Improve one group, given H·E of its columns [B, G, N]; return by how much its weights changed."""
    own, codes = rounded.hessian[:, inside, inside], rounded.codes[:, inside].float()
    scale, zero = rounded.scales[:, group, None], rounded.zeros[:, group, None]
    before = (codes - zero) * scale
    scale, zero = _refit(rounded.grids[group], rounded.dtype, own, codes, scale, zero, slope)
    now = (codes - zero) * scale
    slope = torch.baddbmm(slope, own, now - before, alpha=-1)
    _round_again(own, codes, now, scale, zero, slope, rounded.grids[group].steps)
    change = now - before
    rounded.scales[:, group], rounded.zeros[:, group] = scale[:, 0], zero[:, 0]
    rounded.codes[:, inside] = codes
    return change


def _refit(
    grid: LevelSearch,
    dtype: torch.dtype,
    own: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    slope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and the zero point [B, 1, N] with the least error for a group's codes, as they are stored."""
    centred = codes - zero
    turned = own @ centred
    by_scale, on_scale = _sum(centred * turned), _sum(centred * slope)
    if grid.fixed:
        wider, lower = on_scale / by_scale, torch.zeros_like(scale)
    else:
        # The weights change by centred·wider + lower: two unknowns, two linear equations.
        by_both, by_offset, on_offset = _sum(turned), own.sum(dim=(1, 2))[:, None, None], _sum(slope)
        spread = by_scale * by_offset - by_both.square()
        spread = torch.where(spread > LEAST_SPREAD * by_scale * by_offset, spread, torch.nan)
        wider = (on_scale * by_offset - on_offset * by_both) / spread
        lower = (on_offset * by_scale - on_scale * by_both) / spread
    info = torch.finfo(dtype)
    new = (scale + wider).clamp(info.tiny, info.max).to(dtype).float()
    shifted = zero if grid.fixed else (zero - lower / new).to(dtype).float() + 0.0  # never -0
    change = (codes - shifted) * new - centred * scale
    gain = _sum(change * (2 * slope - own @ change))
    better = (gain > 0) & (shifted.abs() <= min(grid.steps / NARROWEST, MAX_ZERO))
    return torch.where(better, new, scale), torch.where(better, shifted, zero)


def _round_again(
    own: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    slope: torch.Tensor,
    steps: int,
) -> None:
    """Give each column of a group its best code, given all other columns; codes, values and slopes are overwritten."""
    size = codes.shape[1]
    needed = own.diagonal(dim1=1, dim2=2)[..., None]
    for begin in range(0, size, LEAF):
        end = min(begin + LEAF, size)
        before = values[:, begin:end].clone()
        for column in range(begin, end):
            aim = torch.addcdiv(values[:, column], slope[:, column], needed[:, column])
            code = torch.addcdiv(zero[:, 0], aim, scale[:, 0]).round_().clamp_(0, steps)
            value = (code - zero[:, 0]) * scale[:, 0]
            rest = slope[:, column + 1 : end]
            rest.baddbmm_(own[:, column + 1 : end, column, None], (value - values[:, column])[:, None], alpha=-1)
            codes[:, column], values[:, column] = code, value
        change = values[:, begin:end] - before
        slope[:, end:].baddbmm_(own[:, end:, begin:end], change, alpha=-1)


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=1, keepdim=True)

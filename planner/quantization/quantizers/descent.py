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

    def take_away_values(self) -> None:
        """Subtract the rounded weights from ``residuals``."""
        size = self.codes.shape[1] // len(self.grids)
        for group in range(len(self.grids)):
            inside = slice(group * size, (group + 1) * size)
            levels = self.codes[:, inside] - self.zeros[:, group, None]
            self.residuals[:, inside].addcmul_(levels, self.scales[:, group, None], value=-1)


def descend(rounded: Rounded, sweeps: int) -> None:
    """Lower the error trace(Eᵀ·H·E) by passes over all groups."""
    size = rounded.codes.shape[1] // len(rounded.grids)
    changes = rounded.residuals  # by how much a pass changed each group; until the first, the group's residuals
    slopes = torch.empty_like(changes) if sweeps > 1 else None
    for sweep in range(sweeps):
        for group, grid in enumerate(rounded.grids):
            inside = slice(group * size, (group + 1) * size)
            if sweep == 0:
                slope = _first_factor(rounded, inside) @ changes
            else:
                assert slopes is not None
                slope = torch.baddbmm(slopes[:, inside], rounded.hessian[:, inside], changes, alpha=-1)
            if slopes is not None:
                slopes[:, inside] = slope
            changes[:, inside] = _improve(rounded, group, inside, slope) if grid.bits > 1 else 0


def _first_factor(rounded: Rounded, inside: slice) -> torch.Tensor:
    """Return what gives H·E in some columns [B, G, K] from the changes before them and the residuals from there on.

    Without changes H·E is (I + U)·diag(d) times the residuals, of which no earlier columns are needed.
    """
    behind = slice(inside.start, None)
    factor = torch.empty_like(rounded.hessian[:, inside])
    torch.neg(rounded.hessian[:, inside, : inside.start], out=factor[..., : inside.start])
    unit = rounded.factor.feedback[:, inside, behind].triu(1)
    unit.diagonal(dim1=1, dim2=2).fill_(1)
    torch.mul(unit, rounded.factor.cost[:, None, behind], out=factor[..., behind])
    return factor


def _improve(rounded: Rounded, group: int, inside: slice, slope: torch.Tensor) -> torch.Tensor:
    """Improve one group, given H·E of its columns [B, G, N]; return by how much its weights changed."""
    own, codes = rounded.hessian[:, inside, inside], rounded.codes[:, inside].float()
    scale, zero = rounded.scales[:, group, None], rounded.zeros[:, group, None]
    before = (codes - zero) * scale
    scale, zero, slope = _refit(rounded.grids[group], rounded.dtype, own, codes, scale, zero, slope)
    _round_again(own, codes, slope / scale, rounded.grids[group].steps)
    rounded.scales[:, group], rounded.zeros[:, group] = scale[:, 0], zero[:, 0]
    rounded.codes[:, inside] = codes
    return codes.sub_(zero).mul_(scale).sub_(before)


def _refit(
    grid: LevelSearch,
    dtype: torch.dtype,
    own: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    slope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scale and the zero point [B, 1, N] with the least error for a group's codes, as they are stored.

    The third result is H·E [B, G, N] with them.
    """
    # The weights change by centred·wider + lower: two unknowns, and an error that is quadratic in them.
    centred = codes - zero
    turned, offset = own @ centred, own.sum(dim=2, keepdim=True)
    by_scale, by_both, by_offset = _sum(centred * turned), _sum(turned), _sum(offset)
    on_scale, on_offset = _sum(centred.mul_(slope)), _sum(slope)
    if grid.fixed:
        wider, lower = on_scale / by_scale, torch.zeros_like(scale)
    else:
        spread = by_scale * by_offset - by_both.square()
        spread = torch.where(spread > LEAST_SPREAD * by_scale * by_offset, spread, torch.nan)
        wider = (on_scale * by_offset - on_offset * by_both) / spread
        lower = (on_offset * by_scale - on_scale * by_both) / spread
    info = torch.finfo(dtype)
    new = (scale + wider).clamp(info.tiny, info.max).to(dtype).float()
    shifted = zero if grid.fixed else (zero - lower / new).to(dtype).float() + 0.0  # never -0
    wider, lower = (new - scale) / scale, (zero - shifted) * (new / scale)  # over the scale: tiny² would be 0
    pull = (wider * on_scale + lower * on_offset) / scale
    cost = wider.square() * by_scale + lower.square() * by_offset + 2 * wider * lower * by_both
    better = (2 * pull > cost) & (shifted.abs() <= min(grid.steps / NARROWEST, MAX_ZERO))
    wider, lower = (torch.where(better, part * scale, 0) for part in (wider, lower))
    slope = torch.addcmul(slope, turned, wider, value=-1).addcmul_(offset, lower, value=-1)
    return torch.where(better, new, scale), torch.where(better, shifted, zero), slope


def _round_again(own: torch.Tensor, codes: torch.Tensor, pull: torch.Tensor, steps: int) -> None:
    """Give each column of a group its best code, given all other columns.

    Args:
        own: second moments of the group's inputs, float32 [B, G, G].
        codes: float32 [B, G, N]; overwritten.
        pull: H·E of the group over its scale, float32 [B, G, N]; overwritten.
        steps: largest code.
    """
    needed = own.diagonal(dim1=1, dim2=2)[..., None]
    for begin in range(0, codes.shape[1], LEAF):
        end = min(begin + LEAF, codes.shape[1])
        before = codes[:, begin:end].clone()
        for column in range(begin, end):
            old = codes[:, column]
            code = torch.addcdiv(old, pull[:, column], needed[:, column]).round_().clamp_(0, steps)
            fall = old - code
            old.copy_(code)
            if column + 1 < end:
                pull[:, column + 1 : end].baddbmm_(own[:, column + 1 : end, column, None], fall[:, None])
        if end < codes.shape[1]:
            pull[:, end:].baddbmm_(own[:, end:, begin:end], before.sub_(codes[:, begin:end]))


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=1, keepdim=True)

"""Choose the scale and the zero point of a group of weights, given the cost of an error in each column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from planner.quantization.quantizers.base import MAX_ZERO, NARROWEST, ZeroPoints

Search = Literal["range", "mse", "published"]
"""How to choose a scale. ``range`` takes the group's range, ``mse`` the least weighted squared error, ``published`` the
grid search of the paper's published code."""

SHRINK = tuple(1 - 0.04 * step for step in range(16))
"""Fractions of the range that ``mse`` tries before it fits scale and zero point to the codes."""
REFITS = 2

PUBLISHED = tuple(0.9 + 0.002 * step for step in range(101))
PUBLISHED_POWER = 2.4


@dataclass(frozen=True)
class LevelSearch:
    """How to choose the levels of a group.

    Attributes:
        bits: width of the codes.
        symmetric: whether the zero point is 2^(b−1) and the range symmetric about it.
        zero_points: with ``integer``, the zero point is a code and the range includes 0.
        search: see :data:`Search`.
    """

    bits: int
    symmetric: bool = False
    zero_points: ZeroPoints = "float"
    search: Search = "mse"

    @property
    def steps(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def fixed(self) -> bool:
        """Whether the range alone decides the zero point."""
        return self.symmetric or self.zero_points == "integer" or self.search == "published"


def fit_group(
    block: torch.Tensor, cost: torch.Tensor, grid: LevelSearch, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Return the scale and the zero point of one group in every row, float32 [B, N] each, rounded to ``dtype``.

    Args:
        block: weights of the group, float32 [B, G, N]; the input dimension comes before the rows.
        cost: weight of a squared error in each column, float32 [B, G].
        grid: how to choose; one bit is always ±mean|w|.
        dtype: stored dtype, such as float16 or bfloat16.
    """
    if grid.bits == 1:
        scale = 2 * block.abs().mean(dim=1)
        return _storable(block, scale, torch.full_like(scale, 0.5), grid, dtype)
    low, high = block.amin(dim=1), block.amax(dim=1)
    if grid.fixed:
        low, high = low.clamp_max(0), high.clamp_min(0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        scale, zero = 2 * high / grid.steps, torch.full_like(high, (grid.steps + 1) / 2)
    else:
        scale = (high - low) / grid.steps
        zero = -low / torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = zero.round() if grid.zero_points == "integer" else zero
    if grid.search != "range":
        scale, zero = _search(block, cost, scale, zero, grid)
    return _storable(block, scale, zero, grid, dtype)


def _search(
    block: torch.Tensor, cost: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: LevelSearch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point: try fractions of the range's scale, then fit both to the codes of the best one."""
    published = grid.search == "published"
    best, best_scale, best_zero = torch.full_like(scale, float("inf")), scale, zero
    for ratio in PUBLISHED if published else SHRINK:
        candidate = scale * ratio
        _, error = _round(block, candidate, zero, grid.steps)
        if published:
            loss = error.abs_().pow_(PUBLISHED_POWER).sum(dim=1)
        else:
            loss = torch.bmm(cost[:, None], error.square_())[:, 0]
        better = loss < best
        best, best_scale = torch.where(better, loss, best), torch.where(better, candidate, best_scale)
    if published or (grid.fixed and not grid.symmetric):
        return best_scale, zero
    regress = _rescale if grid.symmetric else _regress
    for _ in range(REFITS):
        codes, _ = _round(block, best_scale, best_zero, grid.steps)
        candidate, shifted = regress(block, codes, cost, best_scale, best_zero)
        _, error = _round(block, candidate, shifted, grid.steps)
        loss = torch.bmm(cost[:, None], error.square_())[:, 0]
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale, best_zero = torch.where(better, candidate, best_scale), torch.where(better, shifted, best_zero)
    return best_scale, best_zero


def _round(
    block: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the errors of rounding, [B, G, N] each."""
    inverse = torch.where(scale == 0, torch.ones_like(scale), 1 / scale)[:, None]
    codes = torch.addcmul(zero[:, None], block, inverse).round_().clamp_(0, steps)
    return codes, torch.addcmul(block, codes - zero[:, None], scale[:, None], value=-1)


def _regress(
    block: torch.Tensor, codes: torch.Tensor, cost: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of the weighted least-squares line through (code, weight).

    If all codes of a group are equal, or the slope is not positive, return the old scale and zero point.
    """
    share = (cost / cost.sum(dim=1, keepdim=True))[:, None]
    mean_code, mean_weight = torch.bmm(share, codes), torch.bmm(share, block)
    centred = codes - mean_code
    variance = torch.bmm(share, centred.square())[:, 0]
    slope = torch.bmm(share, centred.mul_(block - mean_weight))[:, 0] / variance
    usable = (variance > 0) & (slope > 0)
    slope = torch.where(usable, slope, scale)
    return slope, torch.where(usable, mean_code[:, 0] - mean_weight[:, 0] / slope, zero)


def _rescale(
    block: torch.Tensor, codes: torch.Tensor, cost: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale of the weighted least-squares line through (code, weight) and a fixed zero point."""
    centred, share = codes - zero[:, None], cost[:, None]
    size = torch.bmm(share, centred.square())[:, 0]
    slope = torch.bmm(share, centred * block)[:, 0] / size
    return torch.where((size > 0) & (slope > 0), slope, scale), zero


def _storable(
    block: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: LevelSearch, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to the stored dtype. A group that is too narrow for its distance from 0 gets the scale |mean|."""
    mean = block.mean(dim=1)
    largest_zero = min(grid.steps / NARROWEST, MAX_ZERO)
    flat = ~(scale * largest_zero >= block.abs().amax(dim=1)) | (scale == 0) | ~torch.isfinite(zero)
    size = torch.where(mean == 0, torch.ones_like(mean), mean.abs())
    scale = torch.where(flat, size, scale)
    if not grid.symmetric or grid.bits == 1:  # a code is then the zero point, and only a group of zeros is flat
        zero = torch.where(flat, (mean < 0).float(), zero)
    zero = zero + 0.0  # never -0
    info = torch.finfo(dtype)
    return scale.clamp(info.tiny, info.max).to(dtype).float(), zero.to(dtype).float()

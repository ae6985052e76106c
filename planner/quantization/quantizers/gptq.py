"""GPTQ (Frantar et al., 2023): round column by column, and compensate for the error in the columns that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from planner.quantization.quantizers.base import Quantized, QuantizedMatrix, ZeroPoints
from planner.quantization.quantizers.descent import LEAF, Rounded, descend
from planner.quantization.quantizers.grid import LevelSearch, Search, fit_group
from planner.quantization.quantizers.hessian import ActOrder, Factor, column_order, factorize
from planner.quantization.quantizers.target import Aim, ahead, corrected
from vllm_moeq.format import CODES_PER_BLOCK, WHOLE_ROW, CheckpointError


@dataclass(frozen=True)
class GptqSettings:
    """Everything besides weights and Hessian that decides the codes.

    Attributes:
        damping: λ added to the Hessian's diagonal, relative to the diagonal's mean.
        act_order: order in which columns are quantized.
        static_groups: whether scales come from the original weights; otherwise from the weights after compensation for
            earlier errors.
        symmetric: whether the zero point is the middle of the codes, 2^(b−1).
        search: how a group's scale is chosen.
        sweeps: passes that lower the error afterwards (:mod:`planner.quantization.quantizers.descent`).
    """

    damping: float = 0.01
    act_order: ActOrder = "group"
    static_groups: bool = False
    symmetric: bool = False
    search: Search = "mse"
    sweeps: int = 1

    def grid(self, bits: int, zero_points: ZeroPoints) -> LevelSearch:
        """Return the settings of a group's levels for a width."""
        return LevelSearch(bits, self.symmetric, zero_points, self.search)


PUBLISHED = GptqSettings(act_order="none", search="published", sweeps=0)
"""The settings behind the paper's results."""

Solve = Callable[
    [torch.Tensor, torch.Tensor, int, int, GptqSettings, ZeroPoints, Aim | None], Sequence[QuantizedMatrix]
]
"""A quantizer with calibration, with the first arguments of :func:`quantize_gptq`."""


def quantize_gptq(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    bits: int,
    group_size: int,
    settings: GptqSettings,
    zero_points: ZeroPoints = "float",
    aim: Aim | None = None,
    storage: torch.dtype | None = None,
) -> list[Quantized]:
    """Quantize several matrices of one shape, each with the Hessian of its own inputs.

    Args:
        weights: float [B, N, K].
        hessians: mean of x·xᵀ over the inputs, float32 [B, K, K]; overwritten.
        bits: width of the codes; one bit is the sign times the mean magnitude.
        group_size: weights per scale along K, or −1 for whole rows.
        settings: see :class:`GptqSettings`.
        zero_points: see :data:`planner.quantization.quantizers.base.ZeroPoints`.
        aim: what to aim at instead of W·x (:mod:`planner.quantization.quantizers.target`).
        storage: dtype of scales and zero points; None chooses float16 or bfloat16.

    Returns:
        One result per matrix, on the device of the weights.

    Raises:
        CheckpointError: a weight is not finite, or K is not a multiple of 32 and of the group size.
        NotPositiveDefiniteError: a Hessian stays unusable with any damping.
        ValueError: ``act_order`` is full without static groups.
    """
    columns = weights.shape[2]
    size = columns if group_size == WHOLE_ROW else group_size
    if columns % CODES_PER_BLOCK or columns % size:
        raise CheckpointError(
            f"expected an input dimension that is a multiple of {CODES_PER_BLOCK} and of the group size {size}, "
            f"found {columns}"
        )
    if settings.act_order == "full" and not settings.static_groups:
        raise ValueError("act_order full needs static_groups: its groups are not contiguous")
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weights)):
        raise CheckpointError("expected finite weights, found NaN or infinity")
    order = column_order(hessians.diagonal(dim1=1, dim2=2), size, settings.act_order)
    if settings.act_order != "none":
        hessians = torch.stack([one[its][:, its] for one, its in zip(hessians, order, strict=True)])
    factor = factorize(hessians, settings.damping)
    if aim is not None and settings.static_groups:  # whose scales are those of the corrected weights
        weights, aim = corrected(weights, aim, factor, order), None
    grid = settings.grid(bits, zero_points)
    solver = _Solver(weights, order, factor, grid, size, settings.static_groups, storage)
    if aim is not None:
        solver.begin_at(ahead(weights, aim, factor, order))
    solver.round()
    if settings.sweeps and not settings.static_groups:
        descend(solver.rounded(hessians), settings.sweeps)
    return solver.results()


class _Solver:
    """The state of one batch. Tensors are [B, K, N], so that a column of the input dimension is contiguous."""

    def __init__(
        self,
        weights: torch.Tensor,
        order: torch.Tensor,
        factor: Factor,
        grid: LevelSearch,
        size: int,
        static: bool,
        storage: torch.dtype | None,
    ) -> None:
        self.size, self.grid, self.factor, self.order = size, grid, factor, order
        original = _transposed(weights)
        self.dtype = storage or _storage(original, size, grid)
        batch, columns, rows = original.shape
        groups = columns // size
        self.scales = original.new_empty(batch, groups, rows)
        self.zeros = torch.empty_like(self.scales)
        # Static groups are groups of the original columns. Other groups are ranges of the new order.
        self.group_of = order // size if static else None
        if static:
            costs = torch.empty_like(factor.cost).scatter_(1, order, factor.cost)
            for group in range(groups):
                inside = slice(group * size, (group + 1) * size)
                fitted = fit_group(original[:, inside], costs[:, inside], grid, self.dtype)
                self.scales[:, group], self.zeros[:, group] = fitted
        self.errors = torch.empty_like(original)  # weights, until a column's error replaces them
        for one, its, place in zip(original, order, self.errors, strict=True):
            torch.index_select(one, 0, its, out=place)
        self.adjusted = self.errors.clone()
        self.aimed = False
        self.codes = torch.empty(original.shape, dtype=torch.uint8, device=original.device)

    def begin_at(self, begun: torch.Tensor) -> None:
        """Begin with the corrections for an aim; see :func:`planner.quantization.quantizers.target.ahead`."""
        self.adjusted.add_(begun)
        self.aimed = True

    def round(self) -> None:
        """Round all columns."""
        self._groups(0, self.errors.shape[1] // self.size)

    def rounded(self, hessian: torch.Tensor) -> Rounded:
        """Return what is known of the rounded columns, given their damped Hessian; it shares its memory."""
        grids = [self.grid] * self.scales.shape[1]
        found = Rounded(self.adjusted, self.codes, self.scales, self.zeros, hessian, self.factor, grids, self.dtype)
        found.take_away_values()
        return found

    def results(self) -> list[Quantized]:
        """Return the results in the input's order of columns."""
        back = self.order.argsort(dim=1)
        if self.group_of is None:
            place = (self.order[:, :: self.size] // self.size)[:, :, None].expand_as(self.scales)
            self.scales = torch.empty_like(self.scales).scatter_(1, place, self.scales)
            self.zeros = torch.empty_like(self.zeros).scatter_(1, place, self.zeros)
        return [
            Quantized(c[its].mT.contiguous(), s.mT.to(self.dtype), z.mT.to(self.dtype), self.grid.bits)
            for c, its, s, z in zip(self.codes, back, self.scales, self.zeros, strict=True)
        ]

    def _groups(self, first: int, last: int) -> None:
        """Quantize a range of groups: the first half, then the second half with the errors of the first passed on."""
        if last - first > 1:
            middle = (first + last) // 2
            self._groups(first, middle)
            self._pass_on(first * self.size, middle * self.size, last * self.size)
            self._groups(middle, last)
            return
        begin, end = first * self.size, last * self.size
        if self.group_of is None:
            block, cost = self._expected(begin, end), self.factor.cost[:, begin:end]
            self.scales[:, first], self.zeros[:, first] = fit_group(block, cost, self.grid, self.dtype)
        self._columns(begin, end)

    def _expected(self, begin: int, end: int) -> torch.Tensor:
        """Return the values [B, G, N] that a group would round if its own rounding made no errors.

        ``adjusted`` contains the corrections for the errors of earlier columns, and for the aim. A correction in one
        column changes the next columns of the group; this is a triangular system.
        """
        original = self.errors[:, begin:end]
        if begin == 0 and not self.aimed:
            return original
        unit = self.factor.feedback[:, begin:end, begin:end].mT
        due = self.adjusted[:, begin:end] - original
        eye = torch.eye(end - begin, dtype=unit.dtype, device=unit.device).expand_as(unit)
        inverse = torch.linalg.solve_triangular(unit, eye, upper=False, unitriangular=True)
        return torch.baddbmm(original, inverse, due)

    def _columns(self, begin: int, end: int) -> None:
        """Quantize a range of columns within one group."""
        if end - begin > LEAF:
            middle = begin + (end - begin) // (2 * LEAF) * LEAF if end - begin > 2 * LEAF else begin + LEAF
            self._columns(begin, middle)
            self._pass_on(begin, middle, end)
            self._columns(middle, end)
            return
        feedback = self.factor.feedback
        for column in range(begin, end):
            scale, zero = self._parameters(column)
            code = torch.addcdiv(zero, self.adjusted[:, column], scale).round_().clamp_(0, self.grid.steps)
            self.codes[:, column] = code
            error = self.errors[:, column].addcmul_(code.sub_(zero), scale, value=-1)
            if column + 1 < end:
                rest = self.adjusted[:, column + 1 : end]
                rest.baddbmm_(feedback[:, column, column + 1 : end, None], error[:, None])

    def _pass_on(self, begin: int, middle: int, end: int) -> None:
        """Correct the columns from ``middle`` to ``end`` for the errors of those from ``begin`` to ``middle``."""
        feedback = self.factor.feedback[:, begin:middle, middle:end]
        self.adjusted[:, middle:end].baddbmm_(feedback.mT, self.errors[:, begin:middle])

    def _parameters(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the zero point of a column, [B, N] each."""
        if self.group_of is None:
            group = column // self.size
            return self.scales[:, group], self.zeros[:, group]
        index = self.group_of[:, column, None, None].expand(-1, 1, self.scales.shape[2])
        return self.scales.gather(1, index)[:, 0], self.zeros.gather(1, index)[:, 0]


def _transposed(weights: torch.Tensor) -> torch.Tensor:
    """Return [B, N, K] as contiguous float32 [B, K, N], matrix by matrix: torch is much slower with all at once."""
    batch, rows, columns = weights.shape
    found = torch.empty((batch, columns, rows), dtype=torch.float32, device=weights.device)
    for matrix, place in zip(weights, found, strict=True):
        place.copy_(matrix.float().t())
    return found


def _storage(original: torch.Tensor, size: int, grid: LevelSearch) -> torch.dtype:
    """Return float16 if its normal range holds all scales, with a margin for corrected weights; else bfloat16."""
    groups = original.unflatten(1, (-1, size))
    scale = (groups.amax(dim=2) - groups.amin(dim=2)) / grid.steps
    used = scale[scale > 0]
    if used.numel() == 0:
        return torch.float16
    info, margin = torch.finfo(torch.float16), 2
    fits = float(used.min()) >= info.tiny * margin and float(used.max()) * margin <= info.max
    return torch.float16 if fits else torch.bfloat16

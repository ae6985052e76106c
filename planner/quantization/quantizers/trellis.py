"""Quantize matrices to trellis codes: tiles of 16 columns at a time, later ones make up for the errors of earlier ones.

GPTQ's feedback works on single columns. Here the codes of 16 columns and 16 rows depend on each other, so the feedback
works on blocks of 16 columns (Tseng et al., 2024), and a Viterbi search rounds each tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planner.quantization.quantizers.base import ZeroPoints
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.hessian import Factor, column_order, factorize
from planner.quantization.quantizers.target import Aim, corrected
from planner.quantization.quantizers.viterbi import best_bits
from vllm_moeq.format import (
    CENTRE,
    CODES_PER_BLOCK,
    ROW_SCALE,
    TILE,
    TRELLIS,
    CheckpointError,
    codes_of_states,
    pack_trellis,
    ring_states,
    trellis_codes,
)

SPREAD = {1: 1.1, 2: 0.97, 3: 0.9, 4: 0.85}
"""Standard deviation of the weights that a width rounds best, relative to that of the codes. It was measured on weights
of a normal distribution, with the scale refitted afterwards."""

SMALLEST = torch.finfo(torch.float16).tiny
"""The smallest scale."""

WIDE = 128
"""Columns whose errors are passed on to all later columns together."""


@dataclass(frozen=True)
class TrellisMatrix:
    """One matrix of trellis codes.

    Attributes:
        own: the bits that each weight adds to its tile's ring, uint8 [N, K].
        scales: float16 or bfloat16 [N], non-zero.
        bits: bits per weight.
    """

    own: torch.Tensor
    scales: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """Return the weights in float32 [N, K]."""
        codes = trellis_codes(pack_trellis(self.own, self.bits), self.bits)
        return codes.float().sub_(CENTRE).mul_(self.scales.float()[:, None])

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :meth:`planner.quantization.quantizers.base.QuantizedMatrix.tensors`."""
        words = pack_trellis(self.own, self.bits)
        return {TRELLIS: words.cpu(), ROW_SCALE: self.scales.contiguous().cpu()}

    def rows(self, part: slice) -> TrellisMatrix:
        """Return some of the rows, from and to multiples of 16."""
        return TrellisMatrix(self.own[part], self.scales[part], self.bits)


def quantize_trellis(
    weights: torch.Tensor,
    hessians: torch.Tensor | None,
    bits: int,
    damping: float = 0.01,
    aim: Aim | None = None,
) -> list[TrellisMatrix]:
    """Quantize several matrices of one shape, each with the second moments of its own inputs.

    Args:
        weights: float [B, N, K], N a multiple of 16, K of 32.
        hessians: mean of x·xᵀ over the inputs, float32 [B, K, K]; overwritten. None counts all inputs alike.
        bits: 1 to 4.
        damping: λ added to the moments' diagonal, relative to the diagonal's mean.
        aim: see :func:`planner.quantization.quantizers.gptq.quantize_gptq`.

    Returns:
        One result per matrix, on the device of the weights.

    Raises:
        CheckpointError: a weight is not finite, or N or K is no such multiple.
        NotPositiveDefiniteError: the moments stay unusable with any damping.
    """
    _, rows, columns = weights.shape
    if rows % TILE or columns % CODES_PER_BLOCK:
        raise CheckpointError(
            f"expected a multiple of {TILE} output neurons and of {CODES_PER_BLOCK} inputs, found {[rows, columns]}"
        )
    if not bool(torch.isfinite(weights).all()):
        raise CheckpointError("expected finite weights, found NaN or infinity")
    factor, aims = None, weights.float()
    if hessians is not None:
        order = column_order(hessians.diagonal(dim1=1, dim2=2), columns, "none")
        factor = factorize(hessians, damping)
        if aim is not None:
            aims = corrected(aims, aim, factor, order)
    return _round(aims, factor, bits)


def solve_trellis(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    bits: int,
    group_size: int,  # noqa: ARG001 (of the interface)
    settings: GptqSettings,
    zero_points: ZeroPoints,  # noqa: ARG001
    aim: Aim | None,
) -> list[TrellisMatrix]:
    """See :func:`quantize_trellis`; of GPTQ's settings it takes the damping."""
    return quantize_trellis(weights, hessians, bits, settings.damping, aim)


def round_trellis(weight: torch.Tensor, bits: int, group_size: int) -> TrellisMatrix:  # noqa: ARG001 (of the interface)
    """Quantize one matrix [N, K] by its weights alone; see :func:`quantize_trellis`."""
    return quantize_trellis(weight[None], None, bits)[0]


def _round(aims: torch.Tensor, factor: Factor | None, bits: int) -> list[TrellisMatrix]:
    """Return the codes and scales that come closest to W* [B, N, K]."""
    codes = codes_of_states().to(aims.device).float()
    wide = aims.square().mean(dim=2, keepdim=True).sqrt_()
    scales = (wide / (float(codes.std(correction=0)) * SPREAD[bits])).clamp_min_(SMALLEST)
    sums = _Sums(aims, factor)
    own = torch.empty(aims.shape, dtype=torch.uint8, device=aims.device)
    for begin in range(0, aims.shape[2], TILE):
        block = slice(begin, begin + TILE)
        target = aims[:, :, block] + sums.correction(begin)
        # Sixteen rows of sixteen columns, row by row, are a tile.
        found = best_bits((target / scales + CENTRE).view(-1, TILE * TILE), bits)
        own[:, :, block] = found.view(target.shape)
        centred = codes[ring_states(found, bits).int()].view(target.shape) - CENTRE
        sums.add(begin, aims[:, :, block] - centred * scales, centred)
    stored = _storage(sums.fitted(scales[:, :, 0]).clamp_min_(SMALLEST))
    return [TrellisMatrix(o, s, bits) for o, s in zip(own, stored, strict=True)]


class _Sums:
    """The errors E and the codes C of the columns so far, and how far they reach into later columns.

    With the moments (I + U)·diag(d)·(I + U)ᵀ, the squared output error is Σ d·(E·(I + U))². Without moments U is 0.
    """

    def __init__(self, aims: torch.Tensor, factor: Factor | None) -> None:
        batch, rows, columns = aims.shape
        self.factor, self.rows = factor, rows
        self.both = aims.new_empty(batch, 2 * rows, columns if factor else TILE)
        self.due = aims.new_zeros(batch, 2 * rows, columns if factor else TILE)
        self.product = aims.new_zeros(batch, rows)
        self.square = aims.new_zeros(batch, rows)

    def correction(self, begin: int) -> torch.Tensor | float:
        """Return what the next 16 columns have to make up for, [B, N, 16]; it brings their part of E·(I + U) to 0."""
        if self.factor is None or begin == 0:
            return 0.0
        feedback, block = self.factor.feedback, slice(begin, begin + TILE)
        first = begin // WIDE * WIDE
        if begin == first:
            before = slice(begin - WIDE, begin)
            self.due[:, :, begin:].baddbmm_(self.both[:, :, before], feedback[:, before, begin:])
        else:
            self.due[:, :, block].baddbmm_(self.both[:, :, first:begin], feedback[:, first:begin, block])
        due: torch.Tensor = torch.linalg.solve_triangular(
            feedback[:, block, block], self.due[:, : self.rows, block], upper=True, left=False, unitriangular=True
        )
        return due

    def add(self, begin: int, errors: torch.Tensor, codes: torch.Tensor) -> None:
        """Take the errors and the codes [B, N, 16] of the next columns."""
        both = torch.cat((errors, codes), dim=1)
        cost: torch.Tensor | float = 1.0
        if self.factor is not None:
            block = slice(begin, begin + TILE)
            self.both[:, :, block] = both
            both = both @ self.factor.feedback[:, block, block].triu(1) + both + self.due[:, :, block]
            cost = self.factor.cost[:, None, block]
        errors, codes = both.split(self.rows, dim=1)
        self.product += (errors * codes * cost).sum(dim=2)
        self.square += (codes * codes * cost).sum(dim=2)

    def fitted(self, scales: torch.Tensor) -> torch.Tensor:
        """Return the scales [B, N] that minimize the squared output error of the codes."""
        return scales + self.product / self.square


def _storage(scales: torch.Tensor) -> torch.Tensor:
    """Round scales to float16 if its range holds all of them, else to bfloat16."""
    return scales.half() if float(scales.max()) <= torch.finfo(torch.float16).max else scales.bfloat16()

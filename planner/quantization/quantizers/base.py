"""The interface of all quantizers, and the rounding to storage that they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from vllm_moeq.format import CODES_PER_BLOCK, PACKED, SCALE, WHOLE_ROW, ZERO, CheckpointError, dequantize, pack

NARROWEST = 2.0**-10
"""Least range of a group, relative to its largest magnitude, for which a zero point is useful. Half precision cannot
resolve a finer range."""

MAX_ZERO = 2.0**15
"""Largest magnitude of a stored zero point; half precision can hold it."""


class QuantizedMatrix(Protocol):
    """One matrix, quantized for some scheme: the result of a quantizer."""

    def dequantize(self) -> torch.Tensor:
        """Return the weights in float32 [N, K]."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the matrix as a file holds it, on the CPU: the scheme's suffix → tensor, rows first."""
        ...

    def rows(self, part: slice) -> QuantizedMatrix:
        """Return some of the rows; they begin and end where the scheme's may."""
        ...


@dataclass(frozen=True)
class Quantized:
    """One matrix on the affine grid: w = (codes − zeros) · scales per group of the input dimension.

    Attributes:
        codes: uint8 [N, K].
        scales: float16 or bfloat16 [N, K / G], non-zero.
        zeros: zero points in the shape and dtype of ``scales``.
        bits: width of the codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """Return the weights in float32 [N, K]."""
        return dequantize(self.codes, self.scales, self.zeros)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :meth:`QuantizedMatrix.tensors`."""
        words = pack(self.codes, self.bits)
        return {PACKED: words.cpu(), SCALE: self.scales.contiguous().cpu(), ZERO: self.zeros.contiguous().cpu()}

    def rows(self, part: slice) -> Quantized:
        """See :meth:`QuantizedMatrix.rows`."""
        return Quantized(self.codes[part], self.scales[part], self.zeros[part], self.bits)


ZeroPoints = Literal["float", "integer"]
"""Kind of zero points. ``float`` allows any number. ``integer`` allows the codes 0 … 2^b − 1, as formats such as GPTQ's
need; a group whose weights all have one sign then gets a wider range that includes 0."""

Quantizer = Callable[[torch.Tensor, int, int], QuantizedMatrix]
"""(weight [N, K], bits, group size or −1 for whole rows) → the quantized matrix."""


def to_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return a float32 view [N, K / G, G] of a finite matrix.

    Raises:
        CheckpointError: K is not a multiple of 32 and of the group size, or a weight is not finite.
    """
    columns = weight.shape[1]
    size = columns if group_size == WHOLE_ROW else group_size
    if columns % CODES_PER_BLOCK or columns % size:
        raise CheckpointError(
            f"expected an input dimension that is a multiple of {CODES_PER_BLOCK} and of the group size {size}, "
            f"found {columns}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError("expected finite weights, found NaN or infinity")
    return weight.float().reshape(weight.shape[0], -1, size)


MAX_WEIGHT = 16384.0
"""The largest weight that can be quantized: weights of models are far below. A scale is at most four times as large, so
that every checkpoint that is written can be loaded (:data:`~vllm_moeq.format.schemes.base.MAX_MAGNITUDE`)."""


def check_weights(weight: torch.Tensor) -> None:
    """Refuse weights that are not finite, or larger than :data:`MAX_WEIGHT`.

    Raises:
        CheckpointError: without the tensor's name, which the caller adds.
    """
    if not weight.numel():
        return
    largest = max(abs(float(bound)) for bound in torch.aminmax(weight))
    if not math.isfinite(largest):
        raise CheckpointError("expected finite weights, found NaN or infinity")
    if largest > MAX_WEIGHT:
        raise CheckpointError(f"expected weights up to {MAX_WEIGHT:g}, found {largest:g}")


def group_range(groups: torch.Tensor, zero_points: ZeroPoints) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest weight [N, K / G] of each group [N, K / G, G].

    With integer zero points the range includes 0. Then −min·(2^b − 1)/(max − min), rounded, is a code.
    """
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    return (low.clamp_max(0), high.clamp_min(0)) if zero_points == "integer" else (low, high)


def finish(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> Quantized:
    """Round scales and zero points to their stored dtype, then choose the nearest code for each weight.

    Codes are chosen last, so that they compensate for the rounding of scale and zero point. A (nearly) constant group
    would need a huge zero point, and the weights would be lost beside it. Such a group gets the scale |mean|: a code
    and a small zero point then give its mean exactly. Scales below bfloat16's normal range are raised to its minimum.

    Args:
        groups: float32 [N, K / G, G].
        scales: float32 [N, K / G], >= 0.
        zeros: float32 [N, K / G].
        bits: width of the codes.

    Raises:
        CheckpointError: weights so large that a scale would be infinite.
    """
    mean = groups.mean(dim=-1)
    largest_zero = min((2**bits - 1) / NARROWEST, MAX_ZERO)
    flat = ~(scales * largest_zero >= groups.abs().amax(dim=-1)) | (scales == 0) | ~torch.isfinite(zeros)
    size = torch.where(mean == 0, torch.ones_like(mean), mean.abs())
    scales = torch.where(flat, size, scales)
    zeros = torch.where(flat, (mean < 0).float(), zeros) + 0.0  # never -0: files compare bit by bit

    scales = scales.clamp_min(torch.finfo(torch.bfloat16).tiny)
    dtype = _storage(scales)
    scales, zeros = scales.to(dtype), zeros.to(dtype)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError("expected weights whose scales are finite in bfloat16, found larger ones")
    codes = torch.round(groups / scales.float()[..., None] + zeros.float()[..., None])
    codes = codes.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(1)
    return Quantized(codes, scales, zeros, bits)


def _storage(scales: torch.Tensor) -> torch.dtype:
    """Return float16 if its normal range holds all scales, else bfloat16."""
    smallest, largest = float(scales.min()), float(scales.max())
    info = torch.finfo(torch.float16)
    return torch.float16 if info.tiny <= smallest and largest <= info.max else torch.bfloat16

"""What every quantizer takes and returns, and the storage rounding that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from vllm_moeq.format import CODES_PER_BLOCK, PACKED, SCALE, WHOLE_ROW, ZERO, CheckpointError, dequantize, pack

NARROWEST = 2.0**-10
"""Least range of a group, relative to its largest magnitude, that is worth a zero point: half
precision resolves no finer one."""

MAX_ZERO = 2.0**15
"""Largest |zero| written, within the range of half precision."""


class QuantizedMatrix(Protocol):
    """One matrix, quantized for some scheme: the result of a quantizer."""

    def dequantize(self) -> torch.Tensor:
        """Return the weights in float32 [N, K]."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the matrix as a file holds it, on the CPU: the scheme's suffix → tensor, rows first."""
        ...


@dataclass(frozen=True)
class Quantized:
    """One matrix on the affine grid: w = (codes − zeros) · scales per group of the input dimension.

    Attributes:
        codes: uint8 [N, K].
        scales: float16 or bfloat16 [N, K / G], non-zero.
        zeros: same shape and dtype.
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


ZeroPoints = Literal["float", "integer"]
"""Any number, or a whole code 0 … 2^b − 1, which formats such as GPTQ's need; integer zero points reach groups on one
side of 0 only by widening their range to 0."""

Quantizer = Callable[[torch.Tensor, int, int], QuantizedMatrix]
"""(weight [N, K], bits, group size or −1) → the quantized matrix."""


def to_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return a float32 view [N, K / G, G] of a finite matrix.

    Raises:
        CheckpointError: K is no multiple of 32 or of the group size, or a weight is not finite.
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


def group_range(groups: torch.Tensor, zero_points: ZeroPoints) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest weight of each group [N, K / G, G] as [N, K / G].

    With integer zero points the range includes 0: −min·(2^b − 1)/(max − min), rounded, is then a code.
    """
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    return (low.clamp_max(0), high.clamp_min(0)) if zero_points == "integer" else (low, high)


def finish(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> Quantized:
    """Round scales and zeros as they are stored, then choose the nearest code for each weight.

    Codes are chosen last, so that they compensate for the rounding of scale and zero. Where a group is
    (nearly) constant, a huge zero would swallow it; such groups get the scale |mean|, which a code
    and a small zero then hit exactly. Scales below bfloat16's normal range are raised to it.

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
    """Half precision unless a scale would leave its normal range; bfloat16 then."""
    smallest, largest = float(scales.min()), float(scales.max())
    info = torch.finfo(torch.float16)
    return torch.float16 if info.tiny <= smallest and largest <= info.max else torch.bfloat16

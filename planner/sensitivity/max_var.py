"""The maximum intra-neuron variance (paper, Definition 3.2, eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

NORM_ERROR = 0.005
"""Bound on the relative error of a neuron's norm: 2^−8 from rounding to bfloat16, and the error of the sum."""

UNDERFLOW = 1e-36
"""Mean squares below this may have been lost in float32."""

BATCH = 8
"""Number of neurons whose variance is computed at a time."""

BLOCK_WEIGHTS = 1 << 20
"""Number of weights read at a time: 2 MiB in half precision fit the cache, and the calls cost little."""

ReadRows = Callable[[int, int], torch.Tensor]
"""(first row, end) → the rows before ``end``; they are valid until the next call."""


def max_variance(first_layer: torch.Tensor) -> float:
    """Return the largest variance of any neuron's input weights; NaN if a weight is not finite.

    Args:
        first_layer: an expert's first-layer matrix [neurons, hidden]; for gated experts the gate (w1).
    """
    rows, columns = first_layer.shape
    return max_variance_of_rows(lambda begin, end: first_layer[begin:end], rows, columns)


def max_variance_of_rows(read: ReadRows, rows: int, columns: int) -> float:
    """Return the same as :func:`max_variance` for a matrix [rows, columns] that is read in blocks of rows.

    One fast pass computes each neuron's mean square, which bounds its variance. Neurons are then taken in the order of
    their bounds: they are read again and their variances computed in float64, until the largest variance exceeds all
    remaining bounds. That mostly takes a handful of neurons.
    """
    step = max(1, BLOCK_WEIGHTS // columns)
    norms = torch.cat([_norms(read(begin, min(begin + step, rows))) for begin in range(0, rows, step)])
    bounds = norms.double().mul_(1 + NORM_ERROR).square_().div_(columns).add_(UNDERFLOW)
    order = bounds.nan_to_num_(nan=math.inf).argsort(descending=True, stable=True)
    largest = 0.0
    while order.numel() and float(bounds[order[0]]) >= largest:
        exact = torch.cat([read(row, row + 1).double() for row in order[:BATCH].tolist()])
        found = float((exact - exact.mean(dim=1, keepdim=True)).square_().mean(dim=1).max())
        if math.isnan(found):
            return found
        largest = max(largest, found)
        order = order[BATCH:]
    return largest


def _norms(block: torch.Tensor) -> torch.Tensor:
    if block.dtype.itemsize == 1:
        block = block.float()  # torch has no norm of 8-bit floats
    norms: torch.Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms

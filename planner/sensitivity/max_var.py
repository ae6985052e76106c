"""The maximum intra-neuron variance (paper, Definition 3.2, eq. 4)."""

from __future__ import annotations

import math

import torch

NORM_ERROR = 0.005
"""Bound on the relative error of a neuron's norm: rounded to bfloat16 2^−8, and the sum's own."""

UNDERFLOW = 1e-36
"""Mean squares below it may have been lost in float32."""

BATCH = 8
"""Neurons whose variance is computed at a time."""


def max_variance(first_layer: torch.Tensor) -> float:
    """Return the largest variance of any neuron's input weights; NaN if a weight is not finite.

    A neuron's mean square bounds its variance and takes one fast pass. Neurons are taken in the order of their bounds,
    their variances computed in float64, until no bound reaches the largest one: mostly a handful.

    Args:
        first_layer: an expert's first-layer matrix [neurons, hidden]; for gated experts the gate (w1).
    """
    if first_layer.dtype.itemsize == 1:
        first_layer = first_layer.float()  # norms of eight bits are not implemented
    norms = torch.linalg.vector_norm(first_layer, dim=1).double()
    bounds = norms.mul_(1 + NORM_ERROR).square_().div_(first_layer.shape[1]).add_(UNDERFLOW)
    order = bounds.nan_to_num_(nan=math.inf).argsort(descending=True, stable=True)
    largest = 0.0
    while order.numel() and float(bounds[order[0]]) >= largest:
        exact = first_layer[order[:BATCH]].double()
        found = float((exact - exact.mean(dim=1, keepdim=True)).square_().mean(dim=1).max())
        if math.isnan(found):
            return found
        largest = max(largest, found)
        order = order[BATCH:]
    return largest

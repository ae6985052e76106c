"""The maximum intra-neuron variance (paper, Definition 3.2, eq. 4)."""

from __future__ import annotations

import torch


def max_variance(first_layer: torch.Tensor) -> float:
    """Return the largest variance of any neuron's input weights.

    Args:
        first_layer: an expert's first-layer matrix [neurons, hidden]; for gated experts the gate (w1).
    """
    return float(first_layer.float().var(dim=1, correction=0).max())

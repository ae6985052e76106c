"""AlphaQ (arXiv 2606.04980): heavy tails in the spectrum of a weight matrix as a sign that its bits matter, no data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

GAMMA = 1.0
"""Power of the relative exponent. Our choice: a spectrum with half the exponent counts twice."""

LARGEST_IN_DOUBLE = 2048
"""Eigenvalues; more are computed in float32, in half the time and memory, which is exact enough for those above some
hundred-thousandth of the largest."""

NOISE = 64
"""Eigenvalues this many roundings of the largest one above 0 may be zeros; 3 to 17 were measured."""

LARGEST_EXPONENT = 1e4
"""Given to spectra without a tail. Those that come near have eigenvalues equal but for rounding."""


def hill_exponent(weight: torch.Tensor) -> float:
    """Return the exponent α of a density ∝ λ^(−α), fitted by Hill's estimator to the large eigenvalues of WᵀW.

    α = 1 + k / Σ_{i ≤ k} ln(λ_i / λ_{k+1}), eigenvalues falling. The tail is the upper half of the spectrum, as
    analyses of heavy tails commonly take it; of eigenvalues that are 0 there is no logarithm, and they count for
    neither half. Small exponents are heavy tails, in (1, :data:`LARGEST_EXPONENT`].

    Args:
        weight: float [N, K], of any magnitude: the exponent does not depend on it.

    Returns:
        α; NaN if a weight is not finite, the largest exponent where fewer than two eigenvalues differ from 0 or those
        of the tail from each other.
    """
    small = min(weight.shape) <= LARGEST_IN_DOUBLE
    matrix = weight.to(torch.float64 if small else torch.float32)
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not math.isfinite(largest):
        return math.nan
    if largest == 0:
        return LARGEST_EXPONENT
    matrix = matrix / largest  # squares of tiny or huge weights would not be representable
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    spectrum = torch.linalg.eigvalsh(gram).flip(0)
    spectrum = spectrum[spectrum > NOISE * torch.finfo(spectrum.dtype).eps * spectrum[0]].double()
    tail = len(spectrum) // 2
    if not tail:
        return LARGEST_EXPONENT
    logarithms = float((spectrum[:tail] / spectrum[tail]).log().sum())
    return min(1 + tail / logarithms, LARGEST_EXPONENT) if logarithms > 0 else LARGEST_EXPONENT


def alpha_costs(
    exponents: Sequence[float], variances: Sequence[float], bits: int, weights_count: Sequence[int]
) -> list[float]:
    """Return the cost of giving each linear a width: (median α / α)^γ · variance · 2^(−2·bits) · number of weights.

    The number of weights makes it a sum over them, so that costs of an expert's matrices may be added.

    Args:
        exponents: of all linears that are compared; see :func:`hill_exponent`.
        variances: of their weights.
        bits: the width.
        weights_count: N · K of each.

    Returns:
        One cost per linear; NaN where its exponent or variance is, which the median then leaves out.

    Raises:
        ValueError: lengths differ.
    """
    known = [exponent for exponent in exponents if not math.isnan(exponent)]
    median = statistics.median(known) if known else math.nan
    return [
        (median / exponent) ** GAMMA * variance * 4.0**-bits * count
        for exponent, variance, count in zip(exponents, variances, weights_count, strict=True)
    ]


MATRICES = ("gate", "up", "down")
"""Of an expert; the exponent depends on the shape, so each is compared with its like."""


def spectral_scores(weight: torch.Tensor) -> tuple[float, float]:
    """Return (α, variance of the weights) of a matrix [N, K]."""
    exact = weight.float()
    return hill_exponent(exact), float(exact.var(correction=0))

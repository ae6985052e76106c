"""AlphaQ (arXiv 2606.04980): a weight matrix needs more bits if its spectrum has a heavy tail; no data is used."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

GAMMA = 1.0
"""Power of the relative exponent. We chose it: a spectrum with half the exponent counts twice."""

LARGEST_IN_DOUBLE = 2048
"""Largest number of eigenvalues that is computed in float64.

More are computed in float32, in half the time and memory. That is exact enough for eigenvalues above some
hundred-thousandth of the largest.
"""

NOISE = 64
"""Eigenvalues up to this many roundings of the largest one may be zeros; 3 to 17 were measured."""

LARGEST_EXPONENT = 1e4
"""Exponent of a spectrum without a tail. Spectra close to it have eigenvalues that differ only by rounding."""


def hill_exponent(weight: torch.Tensor) -> float:
    """Return the exponent α of a density ∝ λ^(−α), fitted by Hill's estimator to the large eigenvalues of WᵀW.

    α = 1 + k / Σ_{i ≤ k} ln(λ_i / λ_{k+1}), eigenvalues falling. The tail is the upper half of the spectrum, as is
    common in analyses of heavy tails. Eigenvalues that are 0 have no logarithm and count for neither half. Small
    exponents mean heavy tails; the range is (1, :data:`LARGEST_EXPONENT`].

    Args:
        weight: float [N, K], of any magnitude: the exponent does not depend on it.

    Returns:
        α; NaN if a weight is not finite; the largest exponent if fewer than two eigenvalues differ from 0 or all
        eigenvalues of the tail are equal.
    """
    small = min(weight.shape) <= LARGEST_IN_DOUBLE
    matrix = weight.to(torch.float64 if small else torch.float32)
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not math.isfinite(largest):
        return math.nan
    if largest == 0:
        return LARGEST_EXPONENT
    matrix = matrix / largest  # squares of tiny or huge weights would under- or overflow
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
    """Return each linear's cost at a width: (median α / α)^γ · variance · 2^(−2·bits) · number of weights.

    The number of weights turns the mean into a sum, so that the costs of an expert's matrices can be added.

    Args:
        exponents: exponents of all linears that are compared; see :func:`hill_exponent`.
        variances: variances of their weights.
        bits: the width.
        weights_count: N · K of each linear.

    Returns:
        One cost per linear; NaN if its exponent or variance is NaN. The median leaves such exponents out.

    Raises:
        ValueError: the lengths differ.
    """
    known = [exponent for exponent in exponents if not math.isnan(exponent)]
    median = statistics.median(known) if known else math.nan
    return [
        (median / exponent) ** GAMMA * variance * 4.0**-bits * count
        for exponent, variance, count in zip(exponents, variances, weights_count, strict=True)
    ]


MATRICES = ("gate", "up", "down")
"""An expert's matrices. Exponents depend on the shape, so each is compared with the same matrix of other experts."""


def spectral_scores(weight: torch.Tensor) -> tuple[float, float]:
    """Return (α, variance of the weights) of a matrix [N, K]."""
    exact = weight.float()
    return hill_exponent(exact), float(exact.var(correction=0))

"""AlphaQ: exponents of spectra that are known, and what its costs are made of."""

from __future__ import annotations

import math

import pytest
import torch

from planner.sensitivity import spectrum
from planner.sensitivity.spectrum import LARGEST_EXPONENT, alpha_costs, hill_exponent


def of_spectrum(eigenvalues: torch.Tensor, columns: int, seed: int = 0) -> torch.Tensor:
    """Return a matrix [N, K], K ≥ N, with these eigenvalues of W·Wᵀ in random directions; float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(eigenvalues)
    left, right = (
        torch.linalg.qr(torch.randn((size, rows), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return (left * eigenvalues.double().sqrt()) @ right.mT


def pareto(count: int, exponent: float) -> torch.Tensor:
    """Return the quantiles of a density ∝ λ^(−exponent) on λ ≥ 1: a sample without its noise."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return quantiles.pow(-1 / (exponent - 1))


def gaussian(rows: int = 64, columns: int = 160, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn((rows, columns), generator=generator)
    return torch.randn((rows, rank), generator=generator) @ torch.randn((rank, columns), generator=generator)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("columns", [256, 600])
def test_finds_the_exponent_of_a_power_law(exponent: float, columns: int) -> None:
    weight = of_spectrum(pareto(256, exponent), columns)
    assert hill_exponent(weight) == pytest.approx(exponent, rel=0.03)
    assert hill_exponent(weight.mT.float()) == pytest.approx(exponent, rel=0.03)


def test_finds_the_exponent_of_a_sample() -> None:
    found = []
    for seed in range(20):
        sample = torch.rand(128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(hill_exponent(of_spectrum(sample.pow(-1 / 2), 128, seed)))
    assert sum(found) / len(found) == pytest.approx(3.0, rel=0.1)


def test_only_the_upper_half_counts() -> None:
    heavy = pareto(128, 2.0)
    light = heavy.clone()
    light[65:] = light[64]  # quantiles fall; the threshold of the tail stays
    assert hill_exponent(of_spectrum(light, 128)) == pytest.approx(hill_exponent(of_spectrum(heavy, 128)), rel=1e-9)


def test_is_the_estimator_in_plain_words() -> None:
    weight = gaussian(10, 40).double()
    values = sorted((float(s) ** 2 for s in torch.linalg.svdvals(weight)), reverse=True)
    expected = 1 + 5 / sum(math.log(value / values[5]) for value in values[:5])
    assert hill_exponent(weight) == pytest.approx(expected, rel=1e-9)


def test_heavier_tails_have_smaller_exponents() -> None:
    weight = gaussian()
    spiked = weight + 3 * gaussian(rank=8, seed=1)
    assert 1 < hill_exponent(spiked) < hill_exponent(weight)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20, 1e35])
def test_does_not_depend_on_the_magnitude(scale: float) -> None:
    assert hill_exponent(gaussian() * scale) == pytest.approx(hill_exponent(gaussian()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_of_stored_weights(dtype: torch.dtype) -> None:
    assert hill_exponent(gaussian().to(dtype)) == pytest.approx(hill_exponent(gaussian()), rel=0.02)


def test_large_matrices_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [gaussian(), gaussian(200, 64), of_spectrum(pareto(128, 2.0), 256), gaussian(rank=20)]
    expected = [hill_exponent(weight) for weight in weights]
    monkeypatch.setattr(spectrum, "LARGEST_IN_DOUBLE", 0)
    assert [hill_exponent(weight) for weight in weights] == pytest.approx(expected, rel=1e-3)
    for weight in (torch.full((64, 96), 0.3), torch.zeros(64, 96), torch.eye(64)):
        assert hill_exponent(weight) == LARGEST_EXPONENT


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(32, 64),
        torch.full((32, 64), 0.3),
        gaussian(rank=1).double(),
        gaussian(1, 64),
        torch.ones(1, 1),
        torch.eye(32),
        torch.linalg.qr(gaussian(64, 64)).Q,
        torch.empty(0, 32),
    ],
)
def test_spectra_without_a_tail_have_the_largest_exponent(weight: torch.Tensor) -> None:
    assert hill_exponent(weight) == LARGEST_EXPONENT


@pytest.mark.parametrize("rank", [2, 5, 20])
def test_eigenvalues_of_zero_have_no_say(rank: int) -> None:
    """Of rank r, the tail is half of r; it would reach into rounding noise otherwise."""
    values = pareto(rank, 2.0)
    alone = hill_exponent(of_spectrum(values, rank))
    padded = torch.cat((values, torch.zeros(100, dtype=torch.float64)))
    assert hill_exponent(of_spectrum(padded, 200)) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_of_weights_that_are_not_finite_is_nan(bad: float) -> None:
    weight = gaussian()
    weight[17, 3] = bad
    assert math.isnan(hill_exponent(weight))


class TestCosts:
    @pytest.mark.parametrize(("bits", "more"), [(1, 1), (2, 1), (3, 1), (4, 4)])
    def test_each_bit_is_a_quarter(self, bits: int, more: int) -> None:
        linears = [2.0, 3.0, 5.0], [0.1, 0.2, 0.3]
        narrow, wide = (alpha_costs(*linears, width, [64, 128, 32]) for width in (bits, bits + more))
        assert [a / b for a, b in zip(narrow, wide, strict=True)] == pytest.approx([4.0**more] * 3)

    def test_by_hand(self) -> None:
        found = alpha_costs([2.0, 4.0, 8.0], [1.0, 1.0, 0.5], 2, [16, 16, 32])
        assert found == pytest.approx([2.0, 1.0, 0.5])

    def test_an_even_number_has_the_median_between(self) -> None:
        assert alpha_costs([2.0, 4.0], [1.0, 1.0], 1, [4, 4]) == pytest.approx([1.5, 0.75])

    def test_gamma_zero_leaves_the_variance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spectrum, "GAMMA", 0.0)
        assert alpha_costs([2.0, 4.0], [1.0, 3.0], 1, [4, 4]) == pytest.approx([1.0, 3.0])

    def test_damaged_weights_cost_nan_and_others_what_they_would(self) -> None:
        found = alpha_costs([2.0, math.nan, 4.0, 8.0], [1.0, 1.0, math.nan, 1.0], 1, [4] * 4)
        assert [math.isnan(cost) for cost in found] == [False, True, True, False]
        assert found[0] == pytest.approx(2.0)
        assert all(math.isnan(cost) for cost in alpha_costs([math.nan], [1.0], 1, [4]))

    def test_degenerate_matrices_cost_something_finite(self) -> None:
        weights = [torch.zeros(32, 64), torch.full((32, 64), 0.3), torch.eye(32), gaussian()]
        exponents = [hill_exponent(weight) for weight in weights]
        variances = [float(weight.var(correction=0)) for weight in weights]
        costs = alpha_costs(exponents, variances, 3, [weight.numel() for weight in weights])
        assert all(math.isfinite(cost) and cost >= 0 for cost in costs)

    def test_none(self) -> None:
        assert alpha_costs([], [], 3, []) == []

    def test_lengths_that_differ(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            alpha_costs([2.0, 3.0], [1.0], 3, [4, 4])

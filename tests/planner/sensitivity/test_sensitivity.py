from __future__ import annotations

import math

import pytest
import torch

from planner.sensitivity import max_variance


def exact(weight: torch.Tensor) -> float:
    return float(weight.double().var(dim=1, correction=0).max())


def random(rows: int = 300, columns: int = 256, scale: float = 0.02, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * scale + mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "weight",
    [
        random(),
        random(1, 64),
        random(200, 14336),
        random(mean=0.5),
        random() * torch.linspace(0.1, 3, 300)[:, None],
        # The neuron of the largest norm has the smallest variance.
        torch.cat([random(100), random(100, scale=0.001, mean=2.0)]),
        torch.cat([random(100), torch.full((1, 256), 8.0)]),
        random(64, 256, scale=1e-3).repeat(5, 1),
        torch.full((10, 64), 0.25),
        torch.zeros(10, 64),
    ],
)
def test_is_the_variance_in_float64(weight: torch.Tensor, dtype: torch.dtype) -> None:
    stored = weight.to(dtype)
    assert max_variance(stored) == pytest.approx(exact(stored), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
def test_survives_magnitudes_whose_squares_float32_has_not(scale: float) -> None:
    stored = (random() * scale).bfloat16()
    assert max_variance(stored) == pytest.approx(exact(stored), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_of_weights_that_are_not_finite_is_nan(bad: float) -> None:
    weight = random()
    weight[17, 3] = bad
    assert math.isnan(max_variance(weight))

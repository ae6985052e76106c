"""The expected use of experts on other texts than the calibration text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.calibration.kl.usage import DRIFT, UNSEEN, use_elsewhere

WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=64)


@given(WEIGHTS)
def test_sum_and_order_stay(weights: list[float]) -> None:
    seen = torch.tensor(weights, dtype=torch.float64)
    use = use_elsewhere(seen)
    assert float(use.sum()) == pytest.approx(float(seen.sum()) + UNSEEN * len(weights))
    assert bool((use > 0).all())
    order = seen.argsort()
    assert bool((use[order].diff() >= -1e-9 * use.max()).all())


def test_nearly_even_use_becomes_even() -> None:
    use = use_elsewhere(torch.tensor([900.0, 1000.0, 1100.0], dtype=torch.float64))
    assert use.tolist() == pytest.approx([1000.5] * 3)


def test_an_expert_that_is_hardly_ever_used_stays_rare() -> None:
    seen = torch.tensor([2.0, 20000.0, 30000.0, 10000.0], dtype=torch.float64)
    use = use_elsewhere(seen)
    assert float(use[0]) < 2 * float(seen[0] + UNSEEN)
    assert use[1:].tolist() == pytest.approx(seen[1:].tolist(), rel=0.02)


def test_the_variance_of_the_logarithms_shrinks_by_that_of_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(64, dtype=torch.float64, generator=generator).mul(0.5).exp() * 1e6
    before, after = (float(values.log().var()) for values in (seen, use_elsewhere(seen)))
    assert after == pytest.approx((1 - DRIFT**2 / before) ** 2 * before, rel=1e-4)

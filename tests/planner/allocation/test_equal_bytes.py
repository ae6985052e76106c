"""Two ways of storing an expert, compared at equal bytes."""

from __future__ import annotations

import pytest

from planner.allocation.equal_bytes import cheaper, cost_at

SIZES, COSTS = [8.0, 16.0, 24.0], [1.0, 0.25, 0.0625]
"""Eight bytes more make an error a quarter."""


@pytest.mark.parametrize(
    ("size", "cost"), [(8.0, 1.0), (12.0, 0.5), (16.0, 0.25), (20.0, 0.125), (28.0, 0.03125), (4.0, 2.0)]
)
def test_costs_fall_geometrically_between_and_beyond_the_choices(size: float, cost: float) -> None:
    assert cost_at(size, SIZES, COSTS) == pytest.approx(cost)


def test_costs_of_nothing_fall_evenly() -> None:
    assert cost_at(12.0, [8.0, 16.0], [0.5, 0.0]) == 0.25
    assert cost_at(12.0, [8.0], [0.5]) == 0.5


def test_a_larger_choice_has_to_earn_its_bytes() -> None:
    assert cheaper(SIZES, COSTS, [12.0, 20.0, 28.0], [0.6, 0.1, 0.03]) == [False, True, True]
    assert cheaper(SIZES, COSTS, SIZES, COSTS) == [False] * 3

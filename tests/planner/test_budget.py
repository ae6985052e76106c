from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.allocation import solve_budget

EXAMPLES = settings(deadline=None, max_examples=60)
WIDTHS = [1, 2, 3]
cost = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 3))
tables = st.lists(st.tuples(cost, cost, cost), min_size=1, max_size=5)


def best_by_trying_all(costs: list[tuple[float, ...]], total_bits: int, minimum: dict[int, int]) -> float | None:
    """Return the least cost, or None when nothing is allowed."""
    allowed = [
        sum(row[WIDTHS.index(bits)] for row, bits in zip(costs, widths, strict=True))
        for widths in product(WIDTHS, repeat=len(costs))
        if sum(widths) <= total_bits and all(widths.count(bits) >= count for bits, count in minimum.items())
    ]
    return min(allowed) if allowed else None


@EXAMPLES
@given(costs=tables, spare=st.integers(0, 10), minimum=st.dictionaries(st.sampled_from(WIDTHS), st.integers(0, 2)))
def test_costs_as_little_as_the_best_of_all(
    costs: list[tuple[float, ...]], spare: int, minimum: dict[int, int]
) -> None:
    total_bits = len(costs) + spare
    best = best_by_trying_all(costs, total_bits, minimum)
    if best is None:
        with pytest.raises(ValueError, match="no widths"):
            solve_budget(costs, WIDTHS, total_bits, minimum)
        return
    chosen = solve_budget(costs, WIDTHS, total_bits, minimum)
    spent = sum(row[WIDTHS.index(bits)] for row, bits in zip(costs, chosen, strict=True))
    assert spent == pytest.approx(best, abs=1e-6, rel=1e-6)


@EXAMPLES
@given(costs=tables, spare=st.integers(0, 10))
def test_stays_within_the_bits(costs: list[tuple[float, ...]], spare: int) -> None:
    total_bits = len(costs) + spare
    assert sum(solve_budget(costs, WIDTHS, total_bits)) <= total_bits


def test_minimum_counts_are_kept() -> None:
    chosen = solve_budget([(9.0, 1.0, 0.0)] * 4, WIDTHS, 12, {1: 2})
    assert sorted(chosen) == [1, 1, 3, 3]


def test_the_columns_follow_the_order_of_the_choices() -> None:
    assert solve_budget([(0.0, 5.0), (5.0, 0.0)], [8, 1], 16) == [8, 1]


def test_large_and_small_costs_together() -> None:
    assert solve_budget([(1e9, 1e9, 0.0), (1e-3, 0.0, 0.0)], WIDTHS, 4) == [3, 1]


@pytest.mark.parametrize(("total_bits", "minimum"), [(2, {}), (8, {3: 3}), (9, {1: 4}), (-1, {})])
def test_limits_that_nothing_meets_are_refused(total_bits: int, minimum: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="no widths"):
        solve_budget([(3.0, 2.0, 1.0)] * 3, WIDTHS, total_bits, minimum)


@pytest.mark.parametrize("costs", [[], [[]], [[1.0, 2.0]], [[float("nan"), 1.0, 2.0]], [[float("inf"), 1.0, 2.0]]])
def test_misshapen_or_infinite_costs_are_refused(costs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="costs must be finite"):
        solve_budget(costs, WIDTHS, 3)


def test_repeated_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        solve_budget([(1.0, 2.0)], [2, 2], 4)


def test_a_minimum_for_an_unknown_width_is_refused() -> None:
    with pytest.raises(ValueError, match="minimum_counts"):
        solve_budget([(1.0, 2.0, 3.0)], WIDTHS, 4, {4: 1})


def test_problems_too_large_for_memory_are_solved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [(8.0 / (1 + expert), 2.0 / (1 + expert), 0.2) for expert in range(6)]
    exact = solve_budget(costs, WIDTHS, 13, {3: 1, 2: 1})
    monkeypatch.setattr("planner.allocation.budget.MAX_CELLS", 0)
    assert solve_budget(costs, WIDTHS, 13, {3: 1, 2: 1}) == exact
    with pytest.raises(ValueError, match="no widths"):
        solve_budget(costs, WIDTHS, 5)

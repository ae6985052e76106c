from __future__ import annotations

import math
import random
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.allocation import solve_budget
from planner.planning.methods import METHODS

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


sized = st.lists(st.tuples(st.tuples(cost, cost, cost), st.integers(1, 6)), min_size=1, max_size=5)


@EXAMPLES
@given(rows=sized, spare=st.integers(-1, 30), program=st.booleans())
def test_sizes_weigh_the_bits(rows: list[tuple[tuple[float, ...], int]], spare: int, program: bool) -> None:
    costs, sizes = [row for row, _ in rows], [size for _, size in rows]
    total_bits = sum(sizes) + spare
    allowed = {
        widths: sum(row[WIDTHS.index(bits)] for row, bits in zip(costs, widths, strict=True))
        for widths in product(WIDTHS, repeat=len(costs))
        if sum(bits * size for bits, size in zip(widths, sizes, strict=True)) <= total_bits
    }
    with pytest.MonkeyPatch.context() as patch:
        if program:
            patch.setattr("planner.allocation.budget.MAX_CELLS", 0)
        if not allowed:
            with pytest.raises(ValueError, match="no widths"):
                solve_budget(costs, WIDTHS, total_bits, sizes=sizes)
            return
        chosen = tuple(solve_budget(costs, WIDTHS, total_bits, sizes=sizes))
    assert chosen in allowed
    assert allowed[chosen] == pytest.approx(min(allowed.values()), abs=1e-4 if program else 1e-9)


@EXAMPLES
@given(costs=tables, spare=st.integers(0, 10), minimum=st.dictionaries(st.sampled_from(WIDTHS), st.integers(0, 1)))
def test_sizes_of_one_change_nothing(costs: list[tuple[float, ...]], spare: int, minimum: dict[int, int]) -> None:
    answers: list[list[int] | str] = []
    for sizes in (None, [1] * len(costs)):
        try:
            answers.append(solve_budget(costs, WIDTHS, len(costs) + spare, minimum, sizes))
        except ValueError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 0], [1, 1, -2]])
def test_impossible_sizes_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="sizes must be 3 positive integers"):
        solve_budget([(3.0, 2.0, 1.0)] * 3, WIDTHS, 9, sizes=sizes)


def test_pmq_is_exact_on_statistics_of_the_shape_of_mixtral_8x7b() -> None:
    """32 layers of 8 experts, every budget, one expert at least with 2 and one with 3 bits, against 6,561 choices."""
    generator = random.Random(0)
    choices = np.array(list(product(WIDTHS, repeat=8)))
    bits, enough = choices.sum(axis=1), (choices == 2).any(axis=1) & (choices == 3).any(axis=1)
    scores = {}
    for layer in range(32):
        tokens = [float(int(generator.lognormvariate(10, 1))) for _ in range(8)]
        errors = [generator.lognormvariate(3, 1) for _ in range(8)]
        scores[f"layer-{layer}"] = {
            "tokens": tokens,
            "gate_probability": [count * generator.uniform(0.2, 0.7) for count in tokens],
            "error_1": errors,
            "error_2": [error * generator.uniform(0.2, 0.9) for error in errors],
            "error_3": [error * generator.uniform(0.03, 0.19) for error in errors],
        }
    costs = METHODS["pmq"].costs
    assert costs is not None
    for table in costs(scores, WIDTHS).values():
        array = np.array(table)
        totals = array[np.arange(8), choices - 1].sum(axis=1)
        for budget in range(12, 21):
            chosen = np.array(solve_budget(table, WIDTHS, budget, {2: 1, 3: 1}))
            assert chosen.sum() <= budget
            assert {2, 3} <= set(chosen.tolist())
            best = totals[(bits <= budget) & enough].min()
            assert array[np.arange(8), chosen - 1].sum() == pytest.approx(best, rel=1e-12)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "average",
    [1.5, 2.0, 2.5],
)
def test_thousands_of_experts_with_one_budget(average: float) -> None:
    """48 layers of 128 experts; no choice costs less than the Lagrangian bound, which needs no solver."""
    generator = np.random.default_rng(0)
    damage = generator.lognormal(-9, 3, size=(6144, 1))
    costs = damage * np.column_stack((np.ones(6144), generator.uniform(0.05, 0.9, 6144), np.full(6144, 0.02)))
    total_bits = int(average * 6144)
    began = time.monotonic()
    chosen = np.array(solve_budget(costs.tolist(), WIDTHS, total_bits))
    assert time.monotonic() - began < 20
    assert chosen.sum() <= total_bits
    total = math.fsum(costs[np.arange(6144), chosen - 1])
    bound = lagrangian_bound(costs, total_bits)
    assert bound <= total * (1 + 1e-12)
    assert total <= bound * (1 + 1e-6)


def lagrangian_bound(costs: np.ndarray, total_bits: int) -> float:
    """Return max over λ >= 0 of Σ min(cost + λ·bits) − λ·total: concave in λ, at most the least possible cost."""

    def value(price: float) -> tuple[float, int]:
        priced = costs + price * np.array(WIDTHS)
        best = priced.argmin(axis=1)
        return math.fsum(priced.min(axis=1)) - price * total_bits, int(best.sum()) + len(costs) - total_bits

    low, high = 0.0, float(costs.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle)[1] > 0 else (low, middle)
    return max(value(low)[0], value(high)[0])

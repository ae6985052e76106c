"""Items with different choices under one limit, such as experts and linears that share bytes."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.allocation import Item, solve_items

EXAMPLES = settings(deadline=None, max_examples=80)
cost = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 3))


def items_of(count: int) -> st.SearchStrategy[Item]:
    """Return items with this many choices."""
    sizes = st.tuples(*[st.integers(0, 40)] * count)
    return st.builds(Item, sizes, st.tuples(*[cost] * count))


MIXED = st.lists(st.integers(1, 4).flatmap(items_of), min_size=1, max_size=5)


@EXAMPLES
@given(items=MIXED, spare=st.integers(-1, 60), program=st.booleans())
def test_costs_as_little_as_the_best_of_all(items: list[Item], spare: int, program: bool) -> None:
    limit = sum(item.least for item in items) + spare
    allowed = {
        choices: math.fsum(item.costs[choice] for item, choice in zip(items, choices, strict=True))
        for choices in product(*(range(len(item.sizes)) for item in items))
        if sum(item.sizes[choice] for item, choice in zip(items, choices, strict=True)) <= limit
    }
    with pytest.MonkeyPatch.context() as patch:
        if program:
            patch.setattr("planner.allocation.budget.MAX_CELLS", 0)
        found = solve_items(items, limit)
    if found is None:
        assert not allowed
        return
    assert allowed[tuple(found)] == pytest.approx(min(allowed.values()), abs=1e-4 if program else 1e-9)


@pytest.mark.parametrize(
    ("experts", "weights", "linears", "average", "gap"),
    [(256, 176_160_768, (41_943_040, 16_777_216), 2.5, 1e-2), (6144, 4_718_592, (10_485_760, 8_388_608), 2.0, 1e-4)],
)
@pytest.mark.timeout(120)
def test_a_whole_model_with_one_budget(
    experts: int, weights: int, linears: tuple[int, ...], average: float, gap: float
) -> None:
    """Mixtral 8x7B's and Qwen3-30B-A3B's experts and attention; the choice costs what the Lagrangian bound allows."""
    generator, widths = np.random.default_rng(0), (1, 2, 3, 4)
    layers = 32 if experts == 256 else 48
    damage = generator.lognormal(-9, 2, size=experts)
    items = [
        Item(tuple(weights * bits // 8 for bits in widths), tuple(float(cost) * 4.0**-bits for bits in widths))
        for cost in damage
    ]
    for count in linears * layers:
        full = float(generator.lognormal(-8, 1))
        sizes = (count // 2 + count // 64, count + count // 64, 2 * count)
        items.append(Item(sizes, (full, full / 250, 0.0)))
    limit = int(weights * average * experts / 8) + sum(item.least for item in items[experts:])
    found = solve_items(items, limit)
    assert found is not None
    assert sum(item.sizes[choice] for item, choice in zip(items, found, strict=True)) <= limit
    assert len(set(found[experts:])) > 1
    total = math.fsum(item.costs[choice] for item, choice in zip(items, found, strict=True))
    assert total <= lagrangian_bound(items, limit) * (1 + gap)


def lagrangian_bound(items: list[Item], limit: int) -> float:
    """Return max over λ >= 0 of Σ min(cost + λ·size) − λ·limit: at most the least possible cost."""

    def value(price: float) -> float:
        return (
            math.fsum(min(c + price * size for c, size in zip(item.costs, item.sizes, strict=True)) for item in items)
            - price * limit
        )

    low, high = -60.0, 0.0
    for _ in range(80):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if value(math.exp(left)) < value(math.exp(right)) else (low, right)
    return value(math.exp(low))

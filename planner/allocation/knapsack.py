"""Solve a small budget problem exactly, by dynamic programming over what is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CELLS = 500_000_000
"""Maximum number of cells (items × states) of the dynamic program; each takes one byte."""

Values = NDArray[np.float64]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Item:
    """Something that takes one of several choices. Items need not have equally many.

    Attributes:
        sizes: what each choice spends of the budget.
        costs: what each choice costs, finite.
    """

    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def least(self) -> int:
        """The size of the smallest choice."""
        return min(self.sizes)

    def only(self, choices: Sequence[int]) -> Item:
        """Return the item with some of its choices alone."""
        return Item(tuple(self.sizes[choice] for choice in choices), tuple(self.costs[choice] for choice in choices))


def in_units(items: Sequence[Item], limit: int) -> tuple[list[list[int]], int]:
    """Return each choice's size beyond its item's smallest, and the limit beyond all smallest ones, in common units.

    The limit is negative if even the smallest choices exceed it. No choice needs more than the largest ones take.
    """
    unit = math.gcd(*(size - item.least for item in items for size in item.sizes)) or 1
    steps = [[(size - item.least) // unit for size in item.sizes] for item in items]
    return steps, min((limit - sum(item.least for item in items)) // unit, sum(map(max, steps)))


def cells(items: Sequence[Item], limit: int, minimum: Mapping[int, int]) -> int:
    """Return the number of cells (items × states) of the dynamic program."""
    states = max(0, in_units(items, limit)[1]) + 1
    for count in minimum.values():
        states *= count + 1
    return len(items) * states


def solve_exactly(items: Sequence[Item], limit: int, minimum: Mapping[int, int]) -> list[int] | None:
    """Return the index of each item's choice, with the least sum of costs, or None if nothing meets the limits.

    Args:
        items: the items.
        limit: upper limit of the sum of sizes.
        minimum: index of a choice → minimum number of items that take it.
    """
    steps, spare = in_units(items, limit)
    if spare < 0:
        return None
    counted = list(minimum)
    # values[units beyond the smallest choices, items at each counted choice]: least cost of the items so far.
    shape = (spare + 1, *(minimum[choice] + 1 for choice in counted))
    values = np.full(shape, np.inf)
    values[(0,) * len(shape)] = 0.0
    taken = []
    for item, mores in zip(items, steps, strict=True):
        after, how = np.full(shape, np.inf), np.zeros(shape, dtype=np.uint8)
        for choice, (cost, more) in enumerate(zip(item.costs, mores, strict=True)):
            if more > spare:
                continue
            moved, stayed = _count(values, counted.index(choice) + 1) if choice in minimum else (values, None)
            found = moved[: spare + 1 - more] + cost
            better = found < after[more:]
            after[more:][better] = found[better]
            code = np.full(shape, 2 * choice, dtype=np.uint8) if stayed is None else 2 * choice + stayed
            how[more:][better] = code[: spare + 1 - more][better]
        values = after
        taken.append(how)
    full = tuple(minimum[choice] for choice in counted)
    last = values.reshape(spare + 1, -1)[:, -1]  # enough at every counted choice
    if not np.isfinite(last).any():
        return None
    return _trace(taken, counted, steps, (int(last.argmin()), *full))


def _count(values: Values, axis: int) -> tuple[Values, Codes]:
    """Return the values after one more item at an axis's choice, and flags that :func:`_trace` needs to walk back.

    The last place of the axis means 'enough'. A flag is 1 where the best predecessor had enough already.
    """
    moved, stayed = np.full_like(values, np.inf), np.zeros(values.shape, dtype=np.uint8)
    size = values.shape[axis]
    front: list[slice] = [slice(None)] * values.ndim
    front[axis] = slice(1, None)
    back = list(front)
    back[axis] = slice(0, size - 1)
    moved[tuple(front)] = values[tuple(back)]
    last = list(front)
    last[axis] = slice(size - 1, size)
    stayed[tuple(last)] = values[tuple(last)] < moved[tuple(last)]
    moved[tuple(last)] = np.minimum(moved[tuple(last)], values[tuple(last)])
    return moved, stayed


def _trace(
    taken: Sequence[Codes], counted: Sequence[int], steps: Sequence[Sequence[int]], state: tuple[int, ...]
) -> list[int]:
    """Return the choices that lead to a state, found by walking back from the last item to the first.

    Args:
        taken: for each item, 2 × its choice, + 1 where its counted choice had enough before.
        counted: choices with minimum counts, in the order of the axes.
        steps: size of each choice of each item beyond the item's smallest, in units.
        state: the final state.
    """
    chosen = []
    for how, mores in zip(reversed(taken), reversed(steps), strict=True):
        choice, stayed = divmod(int(how[state]), 2)
        counts = list(state[1:])
        if choice in counted and not stayed:
            counts[counted.index(choice)] -= 1
        state = (state[0] - mores[choice], *counts)
        chosen.append(choice)
    return chosen[::-1]

"""The exact answer of a small budget problem, by dynamic programming over the bits that are spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

MAX_CELLS = 20_000_000
"""Experts × states that are worth their memory, eight bytes each."""

Table = NDArray[np.float64]


def cells(sizes: Sequence[int], widths: Sequence[int], total_bits: int, minimum: Mapping[int, int]) -> int:
    """Return the size of the dynamic program."""
    states = max(0, total_bits - min(widths) * sum(sizes)) // math.gcd(*sizes) + 1
    for count in minimum.values():
        states *= count + 1
    return len(sizes) * states


def solve_exactly(
    costs: Table, widths: Sequence[int], total_bits: int, minimum: Mapping[int, int], sizes: Sequence[int]
) -> list[int] | None:
    """Return the widths of least summed cost, or None where nothing meets the limits.

    Args:
        costs: [experts, widths], finite.
        widths: of the columns, distinct.
        total_bits: upper limit of the sum of widths.
        minimum: width → at least so many experts with it.
        sizes: how often each expert's bits count, at least once.
    """
    low, counted = min(widths), list(minimum)
    unit = math.gcd(*sizes)
    spare = (total_bits - low * sum(sizes)) // unit
    if spare < 0:
        return None
    steps = [size // unit for size in sizes]
    # values[i][spent beyond the lowest width, experts so far at each counted width]: least cost of the first i experts.
    shape = (spare + 1, *(minimum[width] + 1 for width in counted))
    start = np.full(shape, np.inf)
    start[(0,) * len(shape)] = 0.0
    values = [start]
    for row, step in zip(costs, steps, strict=True):
        after = np.full(shape, np.inf)
        for cost, width in zip(row, widths, strict=True):
            more = (width - low) * step
            if more > spare:
                continue
            moved = _count(values[-1], counted.index(width) + 1) if width in minimum else values[-1]
            np.minimum(after[more:], moved[: spare + 1 - more] + cost, out=after[more:])
        values.append(after)
    full = tuple(minimum[width] for width in counted)
    last = values[-1].reshape(spare + 1, -1)[:, -1]  # enough at every counted width
    if not np.isfinite(last).any():
        return None
    return _trace(values, costs, widths, counted, steps, (int(last.argmin()), *full))


def _count(values: Table, axis: int) -> Table:
    """Return values after one more expert at the width of an axis; the last place of the axis means 'enough'."""
    moved = np.full_like(values, np.inf)
    size = values.shape[axis]
    front = [slice(None)] * values.ndim
    front[axis] = slice(1, None)
    back = [slice(None)] * values.ndim
    back[axis] = slice(0, size - 1)
    moved[tuple(front)] = values[tuple(back)]
    last = [slice(None)] * values.ndim
    last[axis] = slice(size - 1, size)
    moved[tuple(last)] = np.minimum(moved[tuple(last)], values[tuple(last)])
    return moved


def _trace(
    values: Sequence[Table],
    costs: Table,
    widths: Sequence[int],
    counted: Sequence[int],
    steps: Sequence[int],
    state: tuple[int, ...],
) -> list[int]:
    """Return the widths that lead to a state, from the last expert to the first."""
    low, chosen = min(widths), []
    full = tuple(size - 1 for size in values[0].shape[1:])
    for before, row, step in zip(values[-2::-1], costs[::-1], steps[::-1], strict=True):
        best, best_width, best_state = np.inf, widths[0], state
        for cost, width in zip(row, widths, strict=True):
            spent = state[0] - (width - low) * step
            if spent < 0:
                continue
            for counts in _before(state[1:], full, counted.index(width) if width in counted else None):
                value = float(before[(spent, *counts)]) + float(cost)
                if value < best:
                    best, best_width, best_state = value, width, (spent, *counts)
        chosen.append(best_width)
        state = best_state
    return chosen[::-1]


def _before(counts: tuple[int, ...], full: tuple[int, ...], axis: int | None) -> list[tuple[int, ...]]:
    """Return the counts from which one more expert leads to ``counts``."""
    if axis is None:
        return [counts]
    places = [[count] for count in counts]
    places[axis] = [counts[axis] - 1] if counts[axis] else []
    if counts[axis] == full[axis]:
        places[axis].append(counts[axis])
    return list(product(*places))

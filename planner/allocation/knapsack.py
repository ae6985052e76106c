"""Solve a small budget problem exactly, by dynamic programming over the bits spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_CELLS = 500_000_000
"""Maximum number of cells (experts × states) of the dynamic program; each takes one byte."""

Table = NDArray[np.float64]
Codes = NDArray[np.uint8]


def cells(sizes: Sequence[int], widths: Sequence[int], total_bits: int, minimum: Mapping[int, int]) -> int:
    """Return the number of cells (experts × states) of the dynamic program."""
    states = max(0, total_bits - min(widths) * sum(sizes)) // math.gcd(*sizes) + 1
    for count in minimum.values():
        states *= count + 1
    return len(sizes) * states


def solve_exactly(
    costs: Table, widths: Sequence[int], total_bits: int, minimum: Mapping[int, int], sizes: Sequence[int]
) -> list[int] | None:
    """Return the widths of least summed cost, or None if no choice meets the limits.

    Args:
        costs: [experts, widths], finite.
        widths: widths of the columns, distinct.
        total_bits: upper limit of the sum of widths.
        minimum: width → minimum number of experts with it.
        sizes: factor of each expert's bits in the sum, at least 1.
    """
    low, counted = min(widths), list(minimum)
    unit = math.gcd(*sizes)
    spare = (total_bits - low * sum(sizes)) // unit
    if spare < 0:
        return None
    steps = [size // unit for size in sizes]
    # values[units beyond the lowest width, experts at each counted width]: least cost of the experts so far.
    shape = (spare + 1, *(minimum[width] + 1 for width in counted))
    values = np.full(shape, np.inf)
    values[(0,) * len(shape)] = 0.0
    taken = []
    for row, step in zip(costs, steps, strict=True):
        after, how = np.full(shape, np.inf), np.zeros(shape, dtype=np.uint8)
        for column, (cost, width) in enumerate(zip(row, widths, strict=True)):
            more = (width - low) * step
            if more > spare:
                continue
            moved, stayed = _count(values, counted.index(width) + 1) if width in minimum else (values, None)
            found = moved[: spare + 1 - more] + cost
            better = found < after[more:]
            after[more:][better] = found[better]
            code = np.full(shape, 2 * column, dtype=np.uint8) if stayed is None else 2 * column + stayed
            how[more:][better] = code[: spare + 1 - more][better]
        values = after
        taken.append(how)
    full = tuple(minimum[width] for width in counted)
    last = values.reshape(spare + 1, -1)[:, -1]  # enough at every counted width
    if not np.isfinite(last).any():
        return None
    return _trace(taken, widths, counted, steps, (int(last.argmin()), *full))


def _count(values: Table, axis: int) -> tuple[Table, Codes]:
    """Return the values after one more expert at an axis's width, and flags that :func:`_trace` needs to walk back.

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
    taken: Sequence[Codes],
    widths: Sequence[int],
    counted: Sequence[int],
    steps: Sequence[int],
    state: tuple[int, ...],
) -> list[int]:
    """Return the widths that lead to a state, found by walking back from the last expert to the first.

    Args:
        taken: for each expert, 2 × the column of its width, + 1 where its counted width had enough before.
        widths: widths of the columns.
        counted: widths with minimum counts, in the order of the axes.
        steps: size of each expert, in units of their greatest common divisor.
        state: the final state.
    """
    low, chosen = min(widths), []
    for how, step in zip(reversed(taken), reversed(steps), strict=True):
        column, stayed = divmod(int(how[state]), 2)
        width = widths[column]
        counts = list(state[1:])
        if width in counted and not stayed:
            counts[counted.index(width)] -= 1
        state = (state[0] - (width - low) * step, *counts)
        chosen.append(width)
    return chosen[::-1]

"""Compare two ways of storing an expert, whose choices have other sizes, at equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cost_at(size: float, sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the cost that a way of storing would have at a size between its choices.

    The logarithm of a cost falls about linearly with the bits of a weight. Beyond the choices the nearest two go on.

    Args:
        size: the size to compare at.
        sizes: sizes of the choices, ascending and at least one.
        costs: their costs.
    """
    if len(sizes) == 1:
        return costs[0]
    place = next((index for index, known in enumerate(sizes[1:-1]) if size <= known), len(sizes) - 2)
    (low, high), (first, second) = sizes[place : place + 2], costs[place : place + 2]
    share = (size - low) / (high - low)
    if first > 0 and second > 0:
        return math.exp((1 - share) * math.log(first) + share * math.log(second))
    return (1 - share) * first + share * second


def cheaper(
    sizes: Sequence[float], costs: Sequence[float], other_sizes: Sequence[float], other_costs: Sequence[float]
) -> list[bool]:
    """Tell for each choice of another way whether it costs less than this way would at the same size.

    Args:
        sizes: sizes of this way's choices, ascending.
        costs: their costs.
        other_sizes: sizes of the other way's choices.
        other_costs: their costs.
    """
    return [cost < cost_at(size, sizes, costs) for size, cost in zip(other_sizes, other_costs, strict=True)]

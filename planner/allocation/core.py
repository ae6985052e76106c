"""Leave out the choices that no cheapest answer takes, so that what is left of a large problem is small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.allocation.knapsack import Item

STEPS = 200
"""Halvings of the range in which the price lies."""

ROUNDING = 1e-9
"""Share of a sum of floats by which it may be wrong."""


@dataclass(frozen=True)
class _Priced:
    """All items' choices, in rows of one length, with a price per unit of size.

    Attributes:
        sizes: [items, choices].
        costs: the same, infinite where an item has no such choice.
    """

    sizes: NDArray[np.float64]
    costs: NDArray[np.float64]

    @classmethod
    def of(cls, items: Sequence[Item]) -> _Priced:
        """Return the rows of some items."""
        width = max(len(item.sizes) for item in items)
        sizes, costs = np.zeros((len(items), width)), np.full((len(items), width), np.inf)
        for row, item in enumerate(items):
            sizes[row, : len(item.sizes)], costs[row, : len(item.costs)] = item.sizes, item.costs
        return cls(sizes, costs)

    def best(self, price: float) -> NDArray[np.intp]:
        """Return each item's choice of least cost and price."""
        found: NDArray[np.intp] = (self.costs + price * self.sizes).argmin(axis=1)
        return found

    def spent(self, chosen: NDArray[np.intp]) -> float:
        """Return the sum of the sizes of some choices."""
        return float(self.sizes[np.arange(len(chosen)), chosen].sum())

    def cost(self, chosen: NDArray[np.intp]) -> float:
        """Return the sum of the costs of some choices."""
        return float(self.costs[np.arange(len(chosen)), chosen].sum())


def worthwhile(items: Sequence[Item], limit: int) -> list[list[int]]:
    """Return the indices of each item's choices that the cheapest answer may take, at least one per item.

    A price per unit of size in place of the limit gives a lower bound of the cost. Where the bound with one choice
    forced exceeds the cost of an answer that is known, no cheapest answer takes this choice.

    Args:
        items: the items; the sum of their smallest choices is within the limit.
        limit: upper limit of the sum of sizes.
    """
    table = _Priced.of(items)
    price = _price(table, limit)
    priced = table.costs + price * table.sizes
    least = priced.min(axis=1)
    bound = float(least.sum()) - price * limit
    known = table.cost(_filled(table, table.best(price), limit))
    slack = max(0.0, known - bound) + ROUNDING * (abs(known) + price * limit)
    kept = priced - least[:, None] <= slack
    return [np.flatnonzero(row[: len(item.sizes)]).tolist() for row, item in zip(kept, items, strict=True)]


def _price(table: _Priced, limit: int) -> float:
    """Return the lowest price, nearly, at which the choices of least cost and price are within the limit."""
    if table.spent(table.best(0.0)) <= limit:
        return 0.0
    high = 1.0
    while table.spent(table.best(high)) > limit:
        high *= 2
    low = 0.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if table.spent(table.best(middle)) > limit else (low, middle)
    return high


def _filled(table: _Priced, chosen: NDArray[np.intp], limit: int) -> NDArray[np.intp]:
    """Return the choices after the changes that save most, one after the other, within what the limit leaves."""
    rows, chosen = np.arange(len(chosen)), chosen.copy()
    while True:
        left = limit - table.spent(chosen)
        more = table.sizes - table.sizes[rows, chosen][:, None]
        saved = np.where(more <= left, table.costs[rows, chosen][:, None] - table.costs, -np.inf)
        row, choice = divmod(int(saved.argmax()), saved.shape[1])
        if saved[row, choice] <= 0:
            return chosen
        chosen[row] = choice

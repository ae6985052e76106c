"""Choose what costs least under a limit: a width per expert, or one of several choices per item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from planner.allocation.core import worthwhile
from planner.allocation.knapsack import MAX_CELLS, Item, cells, in_units, solve_exactly


def solve_budget(
    costs: Sequence[Sequence[float]],
    bit_choices: Sequence[int],
    total_bits: int,
    minimum_counts: Mapping[int, int] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[int]:
    """Choose one width per expert so that the sum of costs is least and the sum of bits <= ``total_bits``.

    Args:
        costs: cost of giving each expert (or layer) each width, finite, [experts, widths].
        bit_choices: the widths, in the order of the columns.
        total_bits: upper limit of the sum of widths.
        minimum_counts: width → minimum number of experts with it.
        sizes: factor of each expert's bits in the sum; by default 1.

    Returns:
        One width per expert.

    Raises:
        ValueError: misshapen or infinite costs, an unknown width, or limits that no choice meets.
        RuntimeError: see :func:`solve_items`.
    """
    table = np.asarray(costs, dtype=np.float64)
    widths = [int(bits) for bits in bit_choices]
    minimum = dict(minimum_counts or {})
    if table.ndim != 2 or table.shape[1] != len(widths) or not table.size or not np.isfinite(table).all():
        raise ValueError(f"costs must be finite [experts, {len(widths)}], got shape {table.shape}")
    if len(set(widths)) != len(widths) or not set(minimum) <= set(widths):
        raise ValueError(f"widths must be distinct and cover minimum_counts, got {widths} and {minimum}")
    experts = table.shape[0]
    weights = [1] * experts if sizes is None else [int(size) for size in sizes]
    if len(weights) != experts or min(weights) < 1:
        raise ValueError(f"sizes must be {experts} positive integers, got {weights}")
    items = [
        Item(tuple(bits * weight for bits in widths), tuple(row))
        for row, weight in zip(table.tolist(), weights, strict=True)
    ]
    found = solve_items(items, total_bits, {widths.index(bits): count for bits, count in minimum.items()})
    if found is None:
        raise ValueError(f"no widths from {widths} keep {experts} experts within {total_bits} bits, minimum {minimum}")
    return [widths[choice] for choice in found]


def solve_items(items: Sequence[Item], limit: int, minimum: Mapping[int, int] | None = None) -> list[int] | None:
    """Choose for every item so that the sum of costs is least and the sum of sizes at most ``limit``.

    The answer is exact, by dynamic programming, for a large problem over the choices that are worthwhile. Where these
    are too many, as with many equal items, HiGHS solves an integer program; its answer may cost some 1e-6 of the
    largest cost more. The answer is checked in exact integers.

    Args:
        items: the items, at least one.
        limit: upper limit of the sum of sizes.
        minimum: index of a choice → minimum number of items that take it.

    Returns:
        The index of each item's choice; None if no choices meet the limits.

    Raises:
        RuntimeError: the solver failed or returned an answer that breaks a limit.
    """
    least = dict(minimum or {})
    if cells(items, limit, least) <= MAX_CELLS:
        return solve_exactly(items, limit, least)
    if sum(item.least for item in items) > limit:
        return None
    if not least:
        kept = worthwhile(items, limit)
        found = _solve_large([item.only(choices) for item, choices in zip(items, kept, strict=True)], limit, {})
        return None if found is None else [choices[place] for choices, place in zip(kept, found, strict=True)]
    return _solve_large(items, limit, least)


def _solve_large(items: Sequence[Item], limit: int, minimum: Mapping[int, int]) -> list[int] | None:
    """Return the choices as :func:`solve_items` does, of items that may have a single choice."""
    free = [place for place, item in enumerate(items) if len(item.sizes) > 1]
    rest = [items[place] for place in free]
    left = limit - sum(item.least for item in items if len(item.sizes) == 1)
    if not minimum and rest and cells(rest, left, {}) <= MAX_CELLS:
        part = solve_exactly(rest, left, {})
        if part is None:
            return None
        chosen = dict(zip(free, part, strict=True))
        return [chosen.get(place, 0) for place in range(len(items))]
    found = _solve_program(items, limit, minimum)
    if found is not None:
        spent = sum(item.sizes[choice] for item, choice in zip(items, found, strict=True))
        if spent > limit or any(found.count(choice) < count for choice, count in minimum.items()):
            raise RuntimeError(f"the solver's answer breaks a limit: {spent} of {limit}")
    return found


def _solve_program(items: Sequence[Item], limit: int, minimum: Mapping[int, int]) -> list[int] | None:
    """Return the choices of least summed cost by HiGHS, or None if nothing meets the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    steps, spare = in_units(items, limit)
    counts = [len(item.sizes) for item in items]
    first = np.concatenate(([0], np.cumsum(counts)))
    columns = int(first[-1])
    one_each = csr_array((np.ones(columns), np.arange(columns), first), shape=(len(items), columns))
    choices = np.concatenate([np.arange(count) for count in counts])
    limits = [LinearConstraint(one_each, 1.0, 1.0), LinearConstraint(np.concatenate(steps)[None], -np.inf, spare)]
    limits += [LinearConstraint((choices == choice)[None] * 1.0, count, np.inf) for choice, count in minimum.items()]
    costs = np.concatenate([item.costs for item in items])
    result = milp(
        costs / (float(np.abs(costs).max()) or 1.0),
        integrality=np.ones(columns),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return None
    if not result.success:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    return [int(part.argmax()) for part in np.split(result.x, first[1:-1])]

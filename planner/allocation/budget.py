"""Choose the cheapest widths, one per expert, under a limit on the sum of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.allocation.knapsack import MAX_CELLS, cells, solve_exactly


def solve_budget(
    costs: Sequence[Sequence[float]],
    bit_choices: Sequence[int],
    total_bits: int,
    minimum_counts: Mapping[int, int] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[int]:
    """Choose one width per expert so that the sum of costs is least and the sum of bits <= ``total_bits``.

    Up to some ten thousand experts the answer is exact, by dynamic programming. HiGHS solves larger problems as integer
    programs; its answer may cost some 1e-6 of the largest cost more. The answer is checked in exact integers.

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
        RuntimeError: the solver failed or returned an answer that breaks a limit.
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
    if cells(weights, widths, total_bits, minimum) <= MAX_CELLS:
        exact = solve_exactly(table, widths, total_bits, minimum, weights)
        if exact is None:
            raise ValueError(_infeasible(widths, experts, total_bits, minimum))
        return exact
    return _solve_program(table, widths, total_bits, minimum, weights)


def _solve_program(
    table: NDArray[np.float64], widths: list[int], total_bits: int, minimum: dict[int, int], sizes: list[int]
) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import identity, kron, vstack

    experts = table.shape[0]
    ones = np.ones((1, experts))
    one_each = kron(identity(experts), np.ones((1, len(widths))))
    bits_used = kron(np.asarray([sizes]), np.asarray([widths]))
    rows, lower, upper = [one_each, bits_used], [1.0] * experts + [0.0], [1.0] * experts + [float(total_bits)]
    for bits, count in minimum.items():
        rows.append(kron(ones, np.asarray([[float(width == bits) for width in widths]])))
        lower.append(float(count))
        upper.append(float(experts))
    scale = float(np.abs(table).max()) or 1.0
    result = milp(
        (table / scale).ravel(),
        integrality=np.ones(table.size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(vstack(rows).tocsr(), lower, upper),
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        raise ValueError(_infeasible(widths, experts, total_bits, minimum))
    if not result.success:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    chosen = [widths[int(column)] for column in result.x.reshape(table.shape).argmax(axis=1)]
    spent = sum(bits * size for bits, size in zip(chosen, sizes, strict=True))
    if spent > total_bits or any(chosen.count(bits) < count for bits, count in minimum.items()):
        raise RuntimeError(f"the solver's answer breaks a limit: {spent} bits of {total_bits}")
    return chosen


def _infeasible(widths: list[int], experts: int, total_bits: int, minimum: dict[int, int]) -> str:
    return f"no widths from {widths} keep {experts} experts within {total_bits} bits, minimum {minimum}"

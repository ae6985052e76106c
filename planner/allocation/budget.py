"""The cheapest choice of one width per expert under a limit on the sum of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def solve_budget(
    costs: Sequence[Sequence[float]],
    bit_choices: Sequence[int],
    total_bits: int,
    minimum_counts: Mapping[int, int] | None = None,
) -> list[int]:
    """Choose one width per expert so that the summed cost is least and the summed bits <= ``total_bits``.

    An integer program solved by HiGHS with no optimality gap; the answer is checked in exact integers.

    Args:
        costs: [experts, widths], finite; the cost of giving an expert a width.
        bit_choices: the widths, in the order of the columns.
        total_bits: upper limit of the sum of widths.
        minimum_counts: width → at least so many experts with it.

    Returns:
        One width per expert.

    Raises:
        ValueError: misshapen or infinite costs, an unknown width, or limits that nothing meets.
        RuntimeError: the solver failed or returned an answer that breaks a limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import kron, vstack

    table = np.asarray(costs, dtype=np.float64)
    widths = [int(bits) for bits in bit_choices]
    minimum = dict(minimum_counts or {})
    if table.ndim != 2 or table.shape[1] != len(widths) or not table.size or not np.isfinite(table).all():
        raise ValueError(f"costs must be finite [experts, {len(widths)}], got shape {table.shape}")
    if len(set(widths)) != len(widths) or not set(minimum) <= set(widths):
        raise ValueError(f"widths must be distinct and cover minimum_counts, got {widths} and {minimum}")
    experts = table.shape[0]
    ones = np.ones((1, experts))
    one_each = kron(np.eye(experts), np.ones((1, len(widths))))
    bits_used = kron(ones, np.asarray([widths]))
    rows, lower, upper = [one_each, bits_used], [1.0] * experts + [0.0], [1.0] * experts + [float(total_bits)]
    for bits, count in minimum.items():
        rows.append(kron(ones, np.asarray([[float(width == bits) for width in widths]])))
        lower.append(float(count))
        upper.append(float(experts))
    # The solver stops within an absolute gap of 1e-6: large costs make that a small one.
    scale = (float(np.abs(table).max()) or 1.0) / 1e6
    result = milp(
        (table / scale).ravel(),
        integrality=np.ones(table.size),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(vstack(rows).tocsr(), lower, upper),
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        raise ValueError(f"no widths from {widths} keep {experts} experts within {total_bits} bits, minimum {minimum}")
    if not result.success:
        raise RuntimeError(f"the integer program was not solved: {result.message}")
    chosen = [widths[int(column)] for column in result.x.reshape(table.shape).argmax(axis=1)]
    if sum(chosen) > total_bits or any(chosen.count(bits) < count for bits, count in minimum.items()):
        raise RuntimeError(f"the solver's answer breaks a limit: {sum(chosen)} bits of {total_bits}")
    return chosen

"""From scores to widths: which experts compete, in which order, and for how many bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from planner.allocation import level_counts, solve_budget
from planner.model.layout import Layout
from planner.planning.method import CostTable, Method, OrderOptions, Scores
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions
from vllm_moeq.format import UsageError

ExpertId = tuple[str, int]
"""(experts prefix of the layer, the expert's index)."""

Widths = dict[ExpertId, int]


def ranking_groups(layout: Layout, scope: str) -> list[list[ExpertId]]:
    """Return the groups of experts that compete with each other: one per layer, or one for all layers."""
    layers = [[(layer.prefix, expert) for expert in range(layer.num_experts)] for layer in layout.layers]
    return layers if scope == "layer" else [[member for layer in layers for member in layer]]


def group_budgets(groups: Sequence[Sequence[ExpertId]], options: PlanOptions) -> list[int]:
    """Return each group's bits: the average times its size, with fractions carried on to the next group.

    The sum never exceeds the average over all experts, and layers of one size differ by at most one bit.
    """
    budgets: list[int] = []
    wanted = Fraction(0)
    for group in groups:
        wanted += options.avg_bits * len(group)
        budgets.append(math.floor(wanted) - sum(budgets))
    return budgets


def ranked_experts(
    members: Sequence[ExpertId], method: Method, scores: Scores, options: PlanOptions, index: int
) -> list[ExpertId]:
    """Order one group's experts, highest precision first."""
    if method.order is None:
        return list(members)
    names = scores[members[0][0]]
    merged = {metric: [scores[prefix][metric][expert] for prefix, expert in members] for metric in names}
    flags = OrderOptions(options.zeta, options.promotion, options.seed + index)
    return [members[position] for position in method.order(merged, len(members), flags)]


def assign(ranked: Sequence[ExpertId], total_bits: int, options: PlanOptions) -> Widths:
    """Assign widths down the order; overridden experts keep theirs and the others share the rest.

    Raises:
        UsageError: the overrides leave less than the lowest width for the others.
    """
    if METHODS[options.resolved_method].one_width and not options.overrides:
        return dict.fromkeys(ranked, int(options.avg_bits))
    fixed, free, left = _overridden(ranked, total_bits, options)
    if free:
        average = min(Fraction(left, len(free)), Fraction(options.bit_choices[-1]))
        counts = level_counts(len(free), options.bit_choices, average, options.counts)
        fixed.update(zip(free, _descending(counts), strict=True))
    return fixed


def solve(
    members: Sequence[ExpertId], total_bits: int, method: Method, tables: Mapping[str, CostTable], options: PlanOptions
) -> Widths:
    """Return the cheapest widths within the budget; overridden experts keep theirs.

    The method's minimum counts per width hold only if the budget allows all of them.

    Raises:
        UsageError: the overrides leave less than the lowest width for the others.
    """
    choices = options.bit_choices
    fixed, free, left = _overridden(members, total_bits, options)
    if not free:
        return fixed
    costs = [tables[prefix][expert] for prefix, expert in free]
    least = dict.fromkeys(choices[-method.kept_widths :], 1) if method.kept_widths else {}
    try:
        found = solve_budget(costs, choices, left, least)
    except ValueError:  # too few bits for one expert at each of those widths
        found = solve_budget(costs, choices, left)
    return fixed | dict(zip(free, found, strict=True))


def layerwise(layout: Layout, method: Method, scores: Scores, options: PlanOptions) -> tuple[list[str], Widths]:
    """Return the layers, highest precision first, and one width for all experts of each.

    Raises:
        UsageError: overrides are given, or the method ranks layers and they differ in size.
    """
    if options.overrides:
        raise UsageError(f"--overrides: expected a method for single experts, found {options.resolved_method}")
    prefixes = [layer.prefix for layer in layout.layers]
    sizes = [layer.num_experts for layer in layout.layers]
    method_costs = method.costs_for(options.quantizer)
    if method_costs is not None:
        tables = method_costs(scores, options.bit_choices)
        costs = [[sum(column) for column in zip(*tables[prefix], strict=True)] for prefix in prefixes]
        budget = math.floor(options.avg_bits * sum(sizes))
        widths = dict(zip(prefixes, solve_budget(costs, options.bit_choices, budget, sizes=sizes), strict=True))
        ranked = sorted(prefixes, key=lambda prefix: -widths[prefix])
    else:
        if len(set(sizes)) > 1:
            raise UsageError(f"--method {options.resolved_method}: expected layers of one size, found {sizes} experts")
        firsts = ranked_experts([(prefix, 0) for prefix in prefixes], method, scores, options, 0)
        ranked = [prefix for prefix, _ in firsts]
        counts = level_counts(len(ranked), options.bit_choices, options.avg_bits, options.counts)
        widths = dict(zip(ranked, _descending(counts), strict=True))
    return ranked, {
        (layer.prefix, expert): widths[layer.prefix] for layer in layout.layers for expert in range(layer.num_experts)
    }


def _overridden(
    members: Sequence[ExpertId], total_bits: int, options: PlanOptions
) -> tuple[Widths, list[ExpertId], int]:
    """Return the overridden widths, the other experts, and the bits left for these."""
    fixed = {member: options.overrides[_name(member)] for member in members if _name(member) in options.overrides}
    free = [member for member in members if member not in fixed]
    left = total_bits - sum(fixed.values())
    low = options.bit_choices[0]
    if left < low * len(free) or (not free and left < 0):
        raise UsageError(
            f"--overrides: the widths given for {members[0][0]} leave {left} bits for {len(free)} experts, "
            f"less than {low} each; raise --avg-bits or lower an override"
        )
    return fixed, free, left


def _descending(counts: Mapping[int, int]) -> list[int]:
    return [bits for bits in sorted(counts, reverse=True) for _ in range(counts[bits])]


def _name(member: ExpertId) -> str:
    return f"{member[0]}.{member[1]}"

"""Make a plan: checkpoint → scores → order → widths."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from planner.common.memory import peak_bytes, reset_peak
from planner.common.progress import Progress
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.plan_file import Plan, PlanSettings
from planner.planning.assign import (
    ExpertId,
    Widths,
    assign,
    group_budgets,
    layerwise,
    ranked_experts,
    ranking_groups,
    solve,
)
from planner.planning.method import Method, Scores
from planner.planning.methods import METHODS, UNRANKED
from planner.planning.request import PlanOptions, check_options
from planner.planning.scores import linear_scores, score_experts
from planner.planning.together import linear_table, objective, solve_together
from vllm_moeq.format import UsageError

NEAR_TIE = 1e-6


@dataclass
class _Choice:
    """The widths and the order that a method chooses."""

    widths: Widths = field(default_factory=dict)
    order: dict[str, list[int]] = field(default_factory=dict)
    promoted: dict[str, list[int]] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    linears_cost: float = 0.0


def make_plan(model: SourceModel, layout: Layout, options: PlanOptions, progress: Progress) -> Plan:
    """Score the experts, order them and assign widths.

    Raises:
        MoeqError: the options cannot be met, an initial router does not fit, or a tensor is damaged.
    """
    check_options(options)
    began = time.monotonic()
    reset_peak()
    method = METHODS[options.resolved_method] if options.ranked else UNRANKED
    if method.only_compared:
        raise UsageError(f"--method {options.resolved_method}: {method.only_compared}")
    scores, cost = score_experts(model, layout, method, options, progress)
    if method.layerwise:
        chosen = _layerwise(layout, method, scores, options)
    elif method.linears is not None and options.linears is not None:
        chosen = _together(model, layout, method, scores, options)
    else:
        chosen = _choose(layout, method, scores, options)
    experts = {
        layer.prefix: [chosen.widths[layer.prefix, expert] for expert in range(layer.num_experts)]
        for layer in layout.layers
    }
    if method.costs is not None:
        cost["objective"] = _objective(method, scores, experts, options) + chosen.linears_cost
    total = sum(sum(widths) for widths in experts.values())
    cost |= {"seconds": round(time.monotonic() - began, 3), "peak_bytes": peak_bytes()}
    return Plan.model_validate(
        {
            "version": 1,
            "method": options.resolved_method,
            "bit_choices": list(options.bit_choices),
            "avg_bits": float(options.avg_bits),
            "achieved_avg_bits": total / layout.num_experts,
            "experts": experts,
            "linears": chosen.linears,
            "order": chosen.order,
            "scores": scores,
            "promoted": chosen.promoted,
            "near_ties": near_ties(chosen.order, method, scores),
            "settings": _settings(method, options),
            "source": {"model_type": layout.model_type, "fingerprint": model.fingerprint()},
            "cost": cost,
        }
    )


def _choose(layout: Layout, method: Method, scores: Scores, options: PlanOptions) -> _Choice:
    """Give every expert its width, one competing group after the other."""
    found = _Choice(order={layer.prefix: [] for layer in layout.layers})
    groups = ranking_groups(layout, options.ranking or method.scope)
    costs = method.costs_for(options.calibrated_quantizer)
    tables = costs(scores, options.bit_choices) if costs else {}
    for index, (members, total_bits) in enumerate(zip(groups, group_budgets(groups, options), strict=True)):
        if method.costs is not None:
            widths = solve(members, total_bits, method, tables, options)
            ranked = sorted(members, key=lambda member: -widths[member])
        else:
            ranked = ranked_experts(members, method, scores, options, index)
            widths = assign(ranked, total_bits, options)
        found.widths.update(widths)
        for prefix, expert in ranked:
            found.order[prefix].append(expert)
        if method.promotes:
            for prefix, expert in promotions(members, ranked, scores):
                found.promoted.setdefault(prefix, []).append(expert)
    return found


def _together(model: SourceModel, layout: Layout, method: Method, scores: Scores, options: PlanOptions) -> _Choice:
    """Give every expert and every linear its width, all from one budget."""
    costs = method.costs_for(options.calibrated_quantizer)
    linear_costs = method.costs_for(options.linears is not None and options.linears.calibrated)
    if costs is None or linear_costs is None or options.stats is None:
        raise ValueError("expected a method with costs, and statistics")
    table = linear_table(linear_costs, linear_scores(options.stats, layout, options))
    widths, linears = solve_together(model, layout, options, costs(scores, options.bit_choices), table)
    found = _Choice(widths, {layer.prefix: [] for layer in layout.layers}, linears=linears)
    found.linears_cost = objective(layout, table, linears)
    for prefix, expert in sorted(widths, key=lambda member: -widths[member]):
        found.order[prefix].append(expert)
    return found


def _layerwise(layout: Layout, method: Method, scores: Scores, options: PlanOptions) -> _Choice:
    """Give every layer its width; the experts within a layer keep their order."""
    _, widths = layerwise(layout, method, scores, options)
    return _Choice(widths, {layer.prefix: list(range(layer.num_experts)) for layer in layout.layers})


def _objective(method: Method, scores: Scores, experts: Mapping[str, Sequence[int]], options: PlanOptions) -> float:
    """Return the sum of the method's costs over all experts."""
    costs = method.costs_for(options.calibrated_quantizer)
    if costs is None:
        raise ValueError("expected a method with costs")
    tables = costs(scores, options.bit_choices)
    return math.fsum(
        tables[prefix][expert][options.bit_choices.index(bits)]
        for prefix, widths in experts.items()
        for expert, bits in enumerate(widths)
    )


def _settings(method: Method, options: PlanOptions) -> PlanSettings:
    """Return only the options that had an effect."""
    return PlanSettings.model_validate(
        {
            "zeta": options.zeta if method.promotes else None,
            "promotion": options.promotion if method.promotes else None,
            "counts": options.counts if method.order else None,
            "ranking": _scope(method, options),
            "seed": options.seed if method.random else None,
            "quantizer": options.quantizer if method.calibrated_costs else None,
            "stats": str(options.stats) if options.stats and not options.temporary_stats else None,
            "initial_model": str(options.initial_model) if options.initial_model else None,
            "budget_gib": options.budget_gib,
            "overrides": dict(options.overrides),
        }
    )


def _scope(method: Method, options: PlanOptions) -> str | None:
    ranks = (method.order or method.costs) and not method.layerwise
    return options.ranking or method.scope if ranks else None


def promotions(members: Sequence[ExpertId], ranked: Sequence[ExpertId], scores: Scores) -> list[ExpertId]:
    """Return the experts that MaxVar moved up: they stand before an expert of smaller norm."""
    norm = {member: scores[member[0]]["router_norm"][member[1]] for member in members}
    moved, smallest = [], math.inf
    for member in reversed(ranked):
        if norm[member] > smallest:
            moved.append(member)
        smallest = min(smallest, norm[member])
    return moved[::-1]


def near_ties(order: Mapping[str, Sequence[int]], method: Method, scores: Scores) -> dict[str, list[list[int]]]:
    """Return prefix → neighbours in the order whose first metric differs by at most a millionth.

    A metric with several scores has none of its own name, and no ties.
    """
    names = (*method.metrics, *method.observed)
    ties: dict[str, list[list[int]]] = {}
    for prefix, ids in order.items():
        if method.order is None or not names or names[0] not in scores[prefix]:
            continue
        values = scores[prefix][names[0]]
        for first, second in pairwise(ids):
            if abs(values[first] - values[second]) <= NEAR_TIE * max(abs(values[first]), abs(values[second])):
                ties.setdefault(prefix, []).append([first, second])
    return ties

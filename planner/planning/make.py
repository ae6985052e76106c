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
from planner.planning.priced import Priced, priced
from planner.planning.request import PlanOptions, check_options
from planner.planning.scores import linear_scores, score_experts
from planner.planning.together import linear_table, objective, solve_together
from vllm_moeq.format import UsageError

NEAR_TIE = 1e-6


@dataclass
class _Choice:
    """The widths and the order that a method chooses for one way of storing experts, and what they cost."""

    way: Priced
    widths: Widths = field(default_factory=dict)
    order: dict[str, list[int]] = field(default_factory=dict)
    promoted: dict[str, list[int]] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    cost: float = 0.0

    def experts(self, layout: Layout) -> dict[str, list[int]]:
        """Return experts prefix → bits per expert."""
        return {
            layer.prefix: [self.widths[layer.prefix, expert] for expert in range(layer.num_experts)]
            for layer in layout.layers
        }


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
    chosen = min(
        (_chosen(model, layout, method, scores, way) for way in priced(layout, method, scores, options)),
        key=lambda found: found.cost,
    )
    experts = chosen.experts(layout)
    if method.costs is not None:
        cost["objective"] = chosen.cost
    total = sum(sum(widths) for widths in experts.values())
    cost |= {"seconds": round(time.monotonic() - began, 3), "peak_bytes": peak_bytes()}
    return Plan.model_validate(
        {
            "version": 1,
            "method": options.resolved_method,
            "bit_choices": list(options.bit_choices),
            "avg_bits": float(chosen.way.options.avg_bits),
            "achieved_avg_bits": total / layout.num_experts,
            "experts": experts,
            "linears": chosen.linears,
            "schemes": chosen.way.names(experts),
            "order": chosen.order,
            "scores": scores,
            "promoted": chosen.promoted,
            "near_ties": near_ties(chosen.order, method, scores),
            "settings": _settings(method, options),
            "source": {"model_type": layout.model_type, "fingerprint": model.fingerprint()},
            "cost": cost,
        }
    )


def _chosen(model: SourceModel, layout: Layout, method: Method, scores: Scores, way: Priced) -> _Choice:
    """Give every expert its width for one way of storing experts."""
    if method.layerwise:
        found = _layerwise(layout, method, scores, way)
    elif method.linears is not None and way.options.linears is not None:
        found = _together(model, layout, method, way)
    else:
        found = _choose(layout, method, scores, way)
    if method.costs is not None:
        found.cost += _objective(way, found.experts(layout))
    return found


def _choose(layout: Layout, method: Method, scores: Scores, way: Priced) -> _Choice:
    """Give every expert its width, one competing group after the other."""
    options, found = way.options, _Choice(way, order={layer.prefix: [] for layer in layout.layers})
    groups = ranking_groups(layout, options.ranking or method.scope)
    for index, (members, total_bits) in enumerate(zip(groups, group_budgets(groups, options), strict=True)):
        if method.costs is not None:
            widths = solve(members, total_bits, method, way.tables, options)
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


def _together(model: SourceModel, layout: Layout, method: Method, way: Priced) -> _Choice:
    """Give every expert and every linear its width, all from one budget."""
    options = way.options
    costs = None if options.linears is None else method.costs_for(options.linears.quantizer)
    if costs is None or options.stats is None:
        raise ValueError("expected a method with costs, and statistics")
    table = linear_table(costs, linear_scores(options.stats, layout, options))
    widths, linears = solve_together(model, layout, way, table)
    found = _Choice(way, widths, {layer.prefix: [] for layer in layout.layers}, linears=linears)
    found.cost = objective(layout, table, linears)
    for prefix, expert in sorted(widths, key=lambda member: -widths[member]):
        found.order[prefix].append(expert)
    return found


def _layerwise(layout: Layout, method: Method, scores: Scores, way: Priced) -> _Choice:
    """Give every layer its width; the experts within a layer keep their order."""
    _, widths = layerwise(layout, method, scores, way.options)
    return _Choice(way, widths, {layer.prefix: list(range(layer.num_experts)) for layer in layout.layers})


def _objective(way: Priced, experts: Mapping[str, Sequence[int]]) -> float:
    """Return the sum of the costs of all experts."""
    choices = way.options.bit_choices
    return math.fsum(
        way.tables[prefix][expert][choices.index(bits)]
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
            "quantizer": options.quantizer if method.quantizer_costs else None,
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

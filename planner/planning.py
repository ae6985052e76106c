"""Make a plan: checkpoint → scores → order → widths."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import islice, pairwise

import torch

from planner.allocation import level_counts
from planner.budgeting import solve_group
from planner.calibration.statistics import LayerStatistics, read_statistics
from planner.checkpoint import SourceModel
from planner.methods import METHODS, UNRANKED, Method, OrderOptions
from planner.models import Layout, MoeLayer
from planner.options import PlanOptions, check_options
from planner.plan import Plan, Settings
from planner.progress import Progress
from planner.rows import open_threads
from planner.sensitivity import max_variance, router_norm
from vllm_moeq.format import CheckpointError, ShardSet, UsageError

NEAR_TIE = 1e-6

READERS = 8
"""Threads that score matrices: more would only keep more of the model in memory."""

Slot = tuple[str, int]
"""An expert: its layer's prefix and its index."""

OBSERVED = ("tokens", "gate_probability")
"""Metrics that a calibration run has counted."""

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""prefix → metric → one value per expert."""


def make_plan(model: SourceModel, layout: Layout, options: PlanOptions, progress: Progress) -> Plan:
    """Score, order and assign.

    Raises:
        MoeqError: flags that cannot be met, an initial router that does not fit, damaged tensors.
    """
    check_options(options)
    began = time.monotonic()
    method = METHODS[options.resolved_method] if options.ranked else UNRANKED
    scores = score_experts(model, layout, method, options, progress)
    experts: dict[str, list[int]] = {layer.prefix: [0] * layer.num_experts for layer in layout.layers}
    order: dict[str, list[int]] = {layer.prefix: [] for layer in layout.layers}
    promoted: dict[str, list[int]] = {}
    groups = ranking_groups(layout, options.ranking)
    for index, (slots, total_bits) in enumerate(zip(groups, group_budgets(groups, options), strict=True)):
        if method.costs is not None:
            widths = solve_group(slots, total_bits, method, scores, options)
            ranked = sorted(slots, key=lambda slot: -widths[slot])
        else:
            ranked = rank_slots(slots, method, scores, options, index)
            widths = assign(ranked, total_bits, options)
        for (prefix, expert), bits in widths.items():
            experts[prefix][expert] = bits
        for prefix, expert in ranked:
            order[prefix].append(expert)
        if method.promotes:
            for prefix, expert in promotions(slots, ranked, scores):
                promoted.setdefault(prefix, []).append(expert)
    total = sum(sum(widths) for widths in experts.values())
    return Plan.model_validate(
        {
            "version": 1,
            "method": options.resolved_method,
            "bit_choices": list(options.bit_choices),
            "avg_bits": float(options.avg_bits),
            "achieved_avg_bits": total / layout.num_experts,
            "experts": experts,
            "order": order,
            "scores": scores,
            "promoted": promoted,
            "near_ties": near_ties(order, method, scores),
            "settings": _settings(method, options),
            "source": {"model_type": layout.model_type, "fingerprint": model.fingerprint()},
            "cost": {"seconds": round(time.monotonic() - began, 3)},
        }
    )


def _settings(method: Method, options: PlanOptions) -> Settings:
    """Record only the flags that had an effect."""
    return Settings.model_validate(
        {
            "zeta": options.zeta if method.promotes else None,
            "promotion": options.promotion if method.promotes else None,
            "counts": options.counts if method.order else None,
            "ranking": options.ranking if method.order or method.costs else None,
            "seed": options.seed if method.random else None,
            "stats": str(options.stats) if options.stats else None,
            "initial_model": str(options.initial_model) if options.initial_model else None,
            "budget_gib": options.budget_gib,
            "overrides": dict(options.overrides),
        }
    )


def score_experts(
    model: SourceModel, layout: Layout, method: Method, options: PlanOptions, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    """Compute the method's metrics, one matrix per thread in memory at a time.

    Raises:
        MoeqError: an initial router that is missing or of another shape, or a score that is not finite.
    """
    if options.initial_model is not None and "router_norm" not in method.metrics and options.ranked:
        raise UsageError(f"--initial-model: the method {options.resolved_method} does not use it")
    initial = ShardSet(options.initial_model) if options.initial_model is not None else None
    observed = _observed(model, layout, method, options, progress)
    gates = [layer.weight(e, layer.projections.gate) for layer in layout.layers for e in range(layer.num_experts)]
    scores: dict[str, dict[str, list[float]]] = {}
    with open_threads(min(torch.get_num_threads(), READERS)) as threads:
        variances = threads.pool.map(
            lambda name: max_variance(model.shards.map(name)), gates if "max_var" in method.metrics else ()
        )
        for layer in progress.track(layout.layers, "scoring experts"):
            entry: dict[str, list[float]] = {}
            if "router_norm" in method.metrics:
                entry["router_norm"] = _router_norms(model, layer, initial)
            if "max_var" in method.metrics:
                entry["max_var"] = list(islice(variances, layer.num_experts))
            for metric in set(method.metrics) & set(OBSERVED):
                entry[metric] = getattr(observed[layer.prefix], metric).double().tolist()
            if method.costs is not None:
                errors = observed[layer.prefix].errors
                entry |= {f"error_{bits}": errors[bits].double().tolist() for bits in options.bit_choices}
            for metric, values in entry.items():
                if not all(math.isfinite(value) for value in values):
                    raise CheckpointError(f"{model.folder}: {layer.prefix}: {metric} is not finite: damaged weights")
            scores[layer.prefix] = entry
    return scores


def _observed(
    model: SourceModel, layout: Layout, method: Method, options: PlanOptions, progress: Progress
) -> dict[str, LayerStatistics]:
    """Return the statistics of a calibration run, where the method uses them.

    Raises:
        MoeqError: none given, given in vain, or of another model.
    """
    needed = bool(set(method.metrics) & set(OBSERVED))
    if options.stats is None:
        if needed:
            raise UsageError(
                f"--method {options.resolved_method}: expected --stats FILE, which moeq calibrate writes, found none"
            )
        return {}
    if not needed and options.ranked:
        raise UsageError(f"--stats: the method {options.resolved_method} does not use it")
    found, facts = read_statistics(options.stats, layout)
    missing = [bits for bits in options.bit_choices if any(bits not in layer.errors for layer in found.values())]
    if method.costs is not None and missing:
        wanted = ",".join(map(str, options.bit_choices))
        raise UsageError(
            f"--stats: {options.stats}: expected errors at widths {wanted}, found none for {missing}; "
            f"make them with moeq calibrate --errors {wanted}"
        )
    if facts.get("model") != model.fingerprint():
        progress.line(f"note: {options.stats} was made from other files than {model.folder}")
    return found


def _router_norms(model: SourceModel, layer: MoeLayer, initial: ShardSet | None) -> list[float]:
    trained = model.shards.load(layer.router)
    if initial is None:
        return router_norm(trained)
    before = initial.load(layer.router)
    if before.shape != trained.shape:
        raise CheckpointError(
            f"{initial.folder}: tensor {layer.router}: expected {list(trained.shape)}, found {list(before.shape)}"
        )
    return router_norm(trained, before)


def ranking_groups(layout: Layout, ranking: str) -> list[list[Slot]]:
    """Return the experts that compete with each other: those of a layer, or all of them."""
    layers = [[(layer.prefix, expert) for expert in range(layer.num_experts)] for layer in layout.layers]
    return layers if ranking == "layer" else [[slot for layer in layers for slot in layer]]


def group_budgets(groups: Sequence[Sequence[Slot]], options: PlanOptions) -> list[int]:
    """Return each group's bits: the average times its size, fractions carried on to the next group.

    The sum never exceeds the average over all experts, and layers differ by at most one bit.
    """
    budgets: list[int] = []
    wanted = Fraction(0)
    for group in groups:
        wanted += options.avg_bits * len(group)
        budgets.append(math.floor(wanted) - sum(budgets))
    return budgets


def rank_slots(slots: Sequence[Slot], method: Method, scores: Scores, options: PlanOptions, index: int) -> list[Slot]:
    """Order one group's experts, highest precision first."""
    if method.order is None:
        return list(slots)
    merged = {metric: [scores[prefix][metric][expert] for prefix, expert in slots] for metric in method.metrics}
    flags = OrderOptions(options.zeta, options.promotion, options.seed + index)
    return [slots[position] for position in method.order(merged, len(slots), flags)]


def assign(ranked: Sequence[Slot], total_bits: int, options: PlanOptions) -> dict[Slot, int]:
    """Give widths down the order; overridden experts keep theirs and the others share what is left.

    Raises:
        UsageError: overrides that leave less than the lowest width for the others.
    """
    if options.resolved_method == "uniform" and not options.overrides:
        return dict.fromkeys(ranked, int(options.avg_bits))
    low, high = options.bit_choices[0], options.bit_choices[-1]
    fixed = {slot: options.overrides[_name(slot)] for slot in ranked if _name(slot) in options.overrides}
    free = [slot for slot in ranked if slot not in fixed]
    left = total_bits - sum(fixed.values())
    if left < low * len(free) or (not free and left < 0):
        raise UsageError(
            f"--overrides: the widths given for {ranked[0][0]} leave {left} bits for {len(free)} experts, "
            f"less than {low} each; raise --avg-bits or lower an override"
        )
    widths = dict(fixed)
    if free:
        average = min(Fraction(left, len(free)), Fraction(high))
        counts = level_counts(len(free), options.bit_choices, average, options.counts)
        descending = [bits for bits in sorted(counts, reverse=True) for _ in range(counts[bits])]
        widths.update(zip(free, descending, strict=True))
    return widths


def _name(slot: Slot) -> str:
    return f"{slot[0]}.{slot[1]}"


def promotions(slots: Sequence[Slot], ranked: Sequence[Slot], scores: Scores) -> list[Slot]:
    """Return the experts that stand before one of smaller norm: MaxVar moved them up."""
    norm = {slot: scores[slot[0]]["router_norm"][slot[1]] for slot in slots}
    moved, smallest = [], math.inf
    for slot in reversed(ranked):
        if norm[slot] > smallest:
            moved.append(slot)
        smallest = min(smallest, norm[slot])
    return moved[::-1]


def near_ties(order: Mapping[str, Sequence[int]], method: Method, scores: Scores) -> dict[str, list[list[int]]]:
    """Return neighbours in the order whose first metric differs by less than a millionth."""
    if not method.metrics:
        return {}
    ties: dict[str, list[list[int]]] = {}
    for prefix, ids in order.items():
        values = scores[prefix][method.metrics[0]]
        for first, second in pairwise(ids):
            if abs(values[first] - values[second]) <= NEAR_TIE * max(abs(values[first]), abs(values[second])):
                ties.setdefault(prefix, []).append([first, second])
    return ties

"""The scores that a method needs: computed from the weights, or read from calibration statistics."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from planner.calibration.kl.linears.costs import WIDTHS as LINEAR_WIDTHS
from planner.calibration.measures import MEASURES
from planner.calibration.statistics import LayerStatistics, read_linears, read_statistics
from planner.common.progress import Progress
from planner.model.layout import Layout, MoeLayer
from planner.model.linear_groups import linear_groups
from planner.model.source import SourceModel
from planner.planning.method import Method
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions
from planner.quantization.rows import open_threads
from planner.sensitivity import max_variance_of_rows, router_norm, spectral_scores
from planner.sensitivity.max_var import BLOCK_WEIGHTS
from planner.sensitivity.spectrum import MATRICES
from vllm_moeq.format import GRID, CheckpointError, ShardSet, UsageError

READERS = 8
"""Maximum number of threads that score matrices: more would only keep more of the model in memory."""

SCORING = "scoring experts"
"""Name of this work in the progress."""

LayerMetrics = dict[str, list[float]]
Metric = Callable[[SourceModel, Layout, ShardSet | None, ThreadPoolExecutor], Iterator[LayerMetrics]]
"""(model, layout, model before training, threads) → the scores of one layer after the other."""


def _norms(
    model: SourceModel, layout: Layout, initial: ShardSet | None, _pool: ThreadPoolExecutor
) -> Iterator[LayerMetrics]:
    for layer in layout.layers:
        yield {"router_norm": _router_norms(model, layer, initial)}


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


def _variances(
    model: SourceModel, layout: Layout, _initial: ShardSet | None, pool: ThreadPoolExecutor
) -> Iterator[LayerMetrics]:
    gates = [layer.weight(e, layer.projections.gate) for layer in layout.layers for e in range(layer.num_experts)]
    buffers = threading.local()
    variances = pool.map(lambda name: _max_variance(model, name, buffers), gates)
    for layer in layout.layers:
        yield {"max_var": list(islice(variances, layer.num_experts))}


def _max_variance(model: SourceModel, name: str, buffers: threading.local) -> float:
    """Return a matrix's MaxVar. One buffer per thread reads files in the page cache at the speed of memory."""
    info = model.shards.info(name)
    rows, columns = info.shape
    if not hasattr(buffers, "buffer"):
        buffers.buffer = torch.empty(BLOCK_WEIGHTS * info.dtype.itemsize, dtype=torch.uint8)
    return max_variance_of_rows(
        lambda begin, end: model.shards.read_rows(name, begin, end, buffers.buffer), rows, columns
    )


def _spectra(
    model: SourceModel, layout: Layout, _initial: ShardSet | None, pool: ThreadPoolExecutor
) -> Iterator[LayerMetrics]:
    for layer in layout.layers:
        found: LayerMetrics = {}
        for matrix in MATRICES:
            projection = getattr(layer.projections, matrix)
            if projection is None:
                continue
            names = [layer.weight(expert, projection) for expert in range(layer.num_experts)]
            values = list(pool.map(lambda name: spectral_scores(model.shards.map(name)), names))
            found[f"alpha_{matrix}"] = [alpha for alpha, _ in values]
            found[f"variance_{matrix}"] = [variance for _, variance in values]
            found[f"weights_{matrix}"] = [float(math.prod(layer.shapes[projection]))] * layer.num_experts
        yield found


METRICS: dict[str, Metric] = {"router_norm": _norms, "max_var": _variances, "spectrum": _spectra}
"""Scores from weights alone. To add one, write a file in ``planner/sensitivity`` and a row here."""


def score_experts(
    model: SourceModel, layout: Layout, method: Method, options: PlanOptions, progress: Progress
) -> tuple[dict[str, LayerMetrics], dict[str, float]]:
    """Return the method's scores and the cost of calibration; one matrix per thread is in memory at a time.

    Raises:
        MoeqError: the initial router or the statistics are missing, unused, or do not fit the model; or a score is not
            finite.
    """
    if options.initial_model is not None and "router_norm" not in method.metrics and options.ranked:
        raise UsageError(f"--initial-model: the method {options.resolved_method} does not use it")
    initial = ShardSet(options.initial_model) if options.initial_model is not None else None
    observed, cost = _observed(model, layout, method, options, progress)
    scores: dict[str, LayerMetrics] = {}
    with open_threads(min(torch.get_num_threads(), READERS)) as threads:
        computed = [METRICS[name](model, layout, initial, threads.pool) for name in method.metrics]
        for layer in progress.track(layout.layers, SCORING):
            entry: LayerMetrics = {}
            for metric in computed:
                entry |= next(metric)
            entry |= _from_statistics(observed.get(layer.prefix), method, options)
            for name, values in entry.items():
                if not all(math.isfinite(value) for value in values):
                    raise CheckpointError(f"{model.folder}: {layer.prefix}: {name} is not finite: damaged weights")
            scores[layer.prefix] = entry
    return scores, cost


def _from_statistics(found: LayerStatistics | None, method: Method, options: PlanOptions) -> LayerMetrics:
    if found is None:
        return {}
    entry = {name: getattr(found, name).double().tolist() for name in method.observed}
    for measure in options.expert_measures if method.measures else ():
        names = MEASURES[measure].all_names(options.bit_choices)
        entry |= {name: found.measured[name].double().tolist() for name in names}
    return entry


def _observed(
    model: SourceModel, layout: Layout, method: Method, options: PlanOptions, progress: Progress
) -> tuple[dict[str, LayerStatistics], dict[str, float]]:
    """Return the calibration statistics that the method uses, and the seconds and bytes that they took.

    Raises:
        MoeqError: the method needs statistics and there are none, it uses none and some are given, or they do not fit.
    """
    if options.stats is None:
        if method.calibrated:
            raise UsageError(
                f"--method {options.resolved_method}: expected --stats FILE, which moeq calibrate writes, found none"
            )
        return {}, {}
    if not method.calibrated and options.ranked:
        raise UsageError(f"--stats: the method {options.resolved_method} does not use it")
    found, facts = read_observed(options.stats, layout, method, options)
    if facts.get("model") != model.fingerprint():
        progress.line(f"note: {options.stats} was made from other files than {model.folder}")
    parts = [part for name, part in facts.get("cost", {}).items() if name in ("forward", *options.measures)]
    cost = {"calibration_seconds": sum(part["seconds"] for part in parts)}
    for name in ("peak_bytes", "added_bytes"):
        cost[f"calibration_{name}"] = max((part[name] for part in parts), default=0)
    return found, cost


def read_observed(
    path: Path, layout: Layout, method: Method, options: PlanOptions
) -> tuple[dict[str, LayerStatistics], dict[str, Any]]:
    """Return the statistics of a file, and its description.

    Raises:
        MoeqError: they do not fit the model, or lack values that the method needs.
    """
    found, facts = read_statistics(path, layout)
    _require(found, method, options)
    linear_scores(path, layout, options)
    return found, facts


def linear_scores(path: Path, layout: Layout, options: PlanOptions) -> dict[str, list[float]]:
    """Return name → one value per group of linears, if the plan gives linears widths; else nothing.

    Raises:
        MoeqError: the statistics do not fit the model, or have no such values.
    """
    measure = METHODS[options.resolved_method].linears
    if options.linears is None or measure is None:
        return {}
    names = MEASURES[measure].all_names(LINEAR_WIDTHS)
    found = read_linears(path, names, len(linear_groups(layout)))
    if missing := [name for name in names if name not in found]:
        raise UsageError(
            f"--stats: {path}: expected {', '.join(names)} of linears for --linear-bits auto, found no "
            f"{', '.join(missing)}; make them with moeq calibrate --for {options.resolved_method}"
        )
    return found


def _require(found: dict[str, LayerStatistics], method: Method, options: PlanOptions) -> None:
    """Refuse statistics that lack values which the method needs; the message names the command that makes them."""
    known = options.expert_measures if method.measures else ()
    names = [name for measure in known for name in MEASURES[measure].all_names(options.bit_choices)]
    missing = sorted({name for name in names if any(name not in layer.measured for layer in found.values())})
    if missing:
        widths = ",".join(map(str, options.bit_choices))
        scheme = "" if options.scheme == GRID.name else f" --scheme {options.scheme}"
        raise UsageError(
            f"--stats: {options.stats}: expected {', '.join(names)} for --method {options.resolved_method}, found no "
            f"{', '.join(missing)}; make them with moeq calibrate --for {options.resolved_method} "
            f"--bits {widths}{scheme}"
        )

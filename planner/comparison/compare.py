"""Quantize and evaluate the plans of every method at every budget."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from planner.common.progress import Progress
from planner.comparison.entries import Entry, entries
from planner.comparison.evaluate import ORIGINAL, evaluate, key_of
from planner.comparison.request import Comparison, ComparisonRun
from planner.model.layout import Layout
from planner.model.sizes import estimate
from planner.model.source import SourceModel
from planner.output.unfinished import PartialRun
from planner.text.documents import digest

Row = dict[str, Any]
"""One result: method, average, seed, odp, scheme, achieved, ``stored`` (bits per expert weight with scales), bytes,
cost, scores, ``fallbacks`` (how many experts a quantizer with calibration could not calibrate; None without
calibration), and [value, standard error] of each task."""


def compare(
    model: SourceModel,
    layout: Layout,
    wanted: Comparison,
    held_out: Sequence[str],
    output: Path,
    device: torch.device,
    progress: Progress,
    resume: bool = True,
    write: Callable[[list[Row]], None] | None = None,
    jobs: int = 1,
) -> list[Row]:
    """Return one row for the original, and one per method, average, seed and ODP threshold. Continue a killed run.

    Args:
        model: the original model.
        layout: the model's layout.
        wanted: what to compare.
        held_out: texts on which the models are evaluated.
        output: folder that the caller will write; unfinished results of an earlier run are in a folder beside it.
        device: device that layers run on.
        progress: shows the progress.
        resume: continue an unfinished run instead of deleting it.
        write: function that saves the rows; it is called before the run's results are removed.
        jobs: number of models that are quantized at a time, in a process each.

    Raises:
        MoeqError: flags that a method cannot meet, damaged tensors, a full disk.
    """
    fingerprint = {"model": model.fingerprint(), "comparison": wanted.as_dict(), "held_out": digest(held_out)}
    partial = PartialRun(output, fingerprint, resume)
    run = ComparisonRun(model, layout, wanted, partial.folder, device, progress, jobs)
    try:
        found = entries(run)
        found += [replace(entry, odp=threshold) for threshold in wanted.odp for entry in found]
        rows = rows_of(run, found, evaluate(run, found, held_out))
        if write is not None:
            write(rows)
    except BaseException:
        partial.abandon()
        raise
    shutil.rmtree(partial.folder, ignore_errors=True)
    partial.release()
    return rows


def rows_of(run: ComparisonRun, found: Sequence[Entry], scores: Mapping[str, dict[str, Any]]) -> list[Row]:
    """Return the row of the original, then one row per entry."""
    size = sum(info.nbytes for info in run.model.shards.tensors.values())
    original = {"method": ORIGINAL, "average": 16.0, "achieved": 16.0, "bytes": size, **scores[ORIGINAL]}
    return [original, *(_row(run, entry, scores[key_of(run, entry)]) for entry in found)]


def _row(run: ComparisonRun, entry: Entry, scores: dict[str, Any]) -> Row:
    """Return the row of an entry."""
    settings = entry.settings(run.wanted)
    same = {layer.prefix: [int(entry.average)] * layer.num_experts for layer in run.layout.layers}
    experts: Mapping[str, Sequence[int]] = entry.plan.experts if entry.plan else same
    sizes = estimate(run.model, run.layout, experts, settings.group_size, settings.linear, settings.storage)
    weights = sum(layer.num_experts * layer.weights_per_expert for layer in run.layout.layers)
    return {
        "method": entry.method,
        "average": float(entry.average),
        "seed": entry.seed,
        "odp": entry.odp,
        "scheme": entry.scheme,
        "achieved": entry.plan.achieved_avg_bits if entry.plan else float(entry.average),
        "stored": 8 * sizes.expert_bytes / weights,
        "bytes": sizes.total_bytes,
        "cost": entry.cost,
        "model": key_of(run, entry),
        **scores,
    }

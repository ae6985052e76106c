"""Run a model over calibration text, layer by layer, and collect the statistics of its experts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from planner.calibration.measures import MEASURES, READING, Measure, MeasureInputs, check_measures
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import finish, first_hidden, route
from planner.calibration.reading.text import CalibrationText
from planner.calibration.statistics import LayerStatistics, json_path, observe, write_statistics
from planner.common.memory import peak_bytes, reset_peak, resident_bytes
from planner.common.progress import Progress
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.output.files import write_tensors
from planner.output.paths import check_output
from planner.output.unfinished import PartialRun
from vllm_moeq.format import CheckpointError


@dataclass(frozen=True)
class StatisticsRequest:
    """The statistics to collect besides counts.

    Attributes:
        measures: rows of :data:`planner.calibration.measures.MEASURES`.
        widths: bit widths to round experts to, for the measures that round.
        seed: seed of the measures' random draws.
    """

    measures: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, for the description and for fingerprints."""
        return {"measures": list(self.measures), "widths": list(self.widths), "seed": self.seed}

    def sequences(self, layout: Layout, total: int) -> int:
        """Return the number of sequences, out of ``total``, to keep hidden states for."""
        return max((MEASURES[name].sequences(layout, total) for name in self.measures), default=0)


@dataclass
class _Collection:
    """The state of one call of :func:`collect`."""

    decoder: Decoder
    store: HiddenStates
    folder: Path
    wanted: StatisticsRequest
    progress: Progress
    kept: HiddenStates | None
    found: dict[str, LayerStatistics] = field(default_factory=dict)
    linears: dict[str, torch.Tensor] = field(default_factory=dict)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)


def collect(
    model: SourceModel,
    layout: Layout,
    text: CalibrationText,
    output: Path,
    facts: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    resume: bool = True,
    wanted: StatisticsRequest | None = None,
) -> dict[str, LayerStatistics]:
    """Collect statistics and write them to a file; continue a killed run.

    The weights of one layer are in memory at a time.

    Args:
        model: the model, not quantized.
        layout: its layers.
        text: the calibration text.
        output: the safetensors file; a JSON file of the same name is written beside it.
        facts: the JSON file's description of the text.
        device: device that runs the layers.
        dtype: dtype of weights and hidden states.
        progress: shows the progress.
        resume: continue an unfinished run instead of deleting it.
        wanted: the statistics to collect besides counts.

    Returns:
        Experts prefix → statistics.

    Raises:
        MoeqError: the output exists, a tensor is damaged, or the disk is full.
    """
    check_output(json_path(output))
    wanted = wanted or StatisticsRequest()
    check_measures(wanted.measures, model, layout, device)
    names = wanted.as_dict()
    partial = PartialRun(output, {"model": model.fingerprint(), "calibration": facts, **names}, resume)
    try:
        decoder = Decoder(model, layout, device, dtype)
        store = first_hidden(decoder, text.tokens, partial.folder)
        run = _Collection(decoder, store, partial.folder, wanted, progress, _kept(store, wanted, layout))
        _forward(run)
        for name in wanted.measures:
            _measure(run, name, MEASURES[name], text.tokens)
        model.shards.check_unchanged()
        coverage = {prefix: layer.tokens.tolist() for prefix, layer in run.found.items()}
        told = {"model": model.fingerprint(), "calibration": facts, **names, "cost": run.cost, "tokens": coverage}
        write_statistics(output, run.found, told, run.linears)
    except BaseException:
        partial.abandon()
        raise
    shutil.rmtree(partial.folder, ignore_errors=True)
    partial.release()
    return run.found


def _kept(store: HiddenStates, wanted: StatisticsRequest, layout: Layout) -> HiddenStates | None:
    """Return the folder that keeps hidden states for the measures, or None if no measure reads any."""
    count = wanted.sequences(layout, store.shape[0])
    return HiddenStates(store.folder / "kept", (count, *store.shape[1:]), store.dtype) if count else None


def _keep(run: _Collection, index: int, hidden: torch.Tensor) -> None:
    """Keep a layer's input for the sequences that the measures read."""
    if run.kept is not None:
        run.kept.create(index)[:] = hidden[: run.kept.shape[0]]
        run.kept.complete(index)


def _forward(run: _Collection) -> None:
    """Run the model over the text and collect the statistics of each layer."""
    began, idle = time.monotonic(), resident_bytes()
    reset_peak()
    for index in run.progress.track(range(len(run.decoder)), READING):
        _layer(run, index)
    run.cost["forward"] = _cost(began, idle)


def _cost(began: float, idle: int) -> dict[str, float]:
    """Return the seconds and bytes that a part of the run took; ``added_bytes`` is its peak memory beyond ``idle``."""
    peak = peak_bytes()
    seconds = round(time.monotonic() - began, 3)
    return {"seconds": seconds, "peak_bytes": peak, "added_bytes": max(0, peak - idle)}


def _layer(run: _Collection, index: int) -> None:
    """Run one layer and collect its statistics, unless an earlier run did."""
    store, last = run.store, index + 1 == len(run.decoder)
    path = run.folder / f"layer-{index:05d}.safetensors"
    layer = run.decoder.moe.get(index)
    if path.is_file():
        store.drop(index)  # the earlier run may have been killed before it did
        if layer is not None:
            run.found[layer.prefix] = LayerStatistics.of(load_file(path))
        return
    if not store.has(index):
        raise CheckpointError(
            f"{run.folder}: expected the hidden states of layer {index}, found none; --no-resume starts anew"
        )
    hidden = store.load(index)
    _keep(run, index, hidden)
    outputs, tensors = None, {}
    if layer is not None:
        routed = route(run.decoder, index, hidden, store)
        widths: Sequence[int] = run.wanted.widths if "error" in run.wanted.measures else ()
        statistics = observe(run.decoder, layer, routed, hidden.shape[1], widths)
        for row in map(MEASURES.__getitem__, run.wanted.measures):
            if row.layer is not None:
                statistics.measured.update(row.layer(routed, layer.num_experts, run.wanted.seed))
        run.found[layer.prefix], outputs = statistics, routed.outputs
        tensors = statistics.tensors()
        least, seen = int(statistics.tokens.min()), int(statistics.tokens.sum())
        dropped = f", {routed.dropped} tokens not finite" if routed.dropped else ""
        slots = f"{seen:,} token slots, at least {least:,} per expert{dropped}"
        run.progress.line(f"{layer.prefix}: {slots}; {run.progress.where()}")
    if not last or run.kept is not None:
        following = store.create(index + 1)
        finish(run.decoder, index, hidden, following, outputs)
        store.complete(index + 1)
        if last:
            _keep(run, index + 1, following)
    write_tensors(path, tensors)
    store.drop(index)


def _measure(run: _Collection, name: str, row: Measure, tokens: torch.Tensor) -> None:
    """Compute a measure, unless an earlier run did, and add its values to the statistics."""
    if row.run is None:
        return
    path = run.folder / f"measure-{name}.safetensors"
    if not path.is_file():
        began, idle = time.monotonic(), resident_bytes()
        reset_peak()
        values, facts = row.run(
            MeasureInputs(
                run.decoder, run.kept or run.store, tokens, run.found, run.wanted.widths, run.wanted.seed, run.progress
            )
        )
        run.cost[name] = {**_cost(began, idle), **facts}
        tensors = {f"{prefix}.{key}": v.float() for prefix, entry in values.items() for key, v in entry.items()}
        write_tensors(path, tensors)
    for key, value in load_file(path).items():
        prefix, _, metric = key.rpartition(".")
        place = run.linears if row.of_linears else run.found[prefix].measured
        place[metric] = value

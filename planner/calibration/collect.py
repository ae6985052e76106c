"""Runs a model over calibration text, layer by layer, and gathers the statistics of its experts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from planner.calibration.decoder import Decoder
from planner.calibration.hidden import HiddenStates
from planner.calibration.routed import finish, first_hidden, route
from planner.calibration.statistics import LayerStatistics, json_path, observe, write_statistics
from planner.calibration.text import CalibrationText
from planner.checkpoint import SourceModel, check_output
from planner.files import write_tensors
from planner.models import Layout
from planner.partial import PartialRun
from planner.progress import Progress
from vllm_moeq.format import CheckpointError


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
    widths: Sequence[int] = (),
) -> dict[str, LayerStatistics]:
    """Write a statistics file; one layer of weights is in memory at a time. Continues a killed run.

    Args:
        model: the model, not quantized.
        layout: its layers.
        text: what it reads.
        output: the safetensors file; a JSON file of the same name is written beside it.
        facts: what the JSON file says of the text.
        device: where layers run.
        dtype: of weights and hidden states.
        progress: says how far it is.
        resume: continue an unfinished run instead of deleting it.
        widths: for which to measure each expert's error.

    Returns:
        Experts prefix → statistics.

    Raises:
        MoeqError: an output that exists, a damaged tensor, a full disk.
    """
    check_output(json_path(output))
    fingerprint = {"model": model.fingerprint(), "calibration": facts, "widths": list(widths)}
    run = PartialRun(output, fingerprint, resume)
    try:
        decoder = Decoder(model, layout, device, dtype)
        store = first_hidden(decoder, text.tokens, run.folder)
        found: dict[str, LayerStatistics] = {}
        for index in progress.track(range(len(decoder)), "calibrating"):
            _layer(decoder, store, index, run.folder, found, progress, widths)
        coverage = {prefix: layer.tokens.tolist() for prefix, layer in found.items()}
        write_statistics(output, found, {"model": model.fingerprint(), "calibration": facts, "tokens": coverage})
    except BaseException:
        run.abandon()
        raise
    shutil.rmtree(run.folder, ignore_errors=True)
    run.release()
    return found


def _layer(
    decoder: Decoder,
    store: HiddenStates,
    index: int,
    folder: Path,
    found: dict[str, LayerStatistics],
    progress: Progress,
    widths: Sequence[int],
) -> None:
    """Run one layer, unless an earlier run did, and note its statistics."""
    path = folder / f"layer-{index:05d}.safetensors"
    layer = decoder.moe.get(index)
    if path.is_file():
        store.drop(index)  # if the earlier run was killed before it could
        if layer is not None:
            found[layer.prefix] = LayerStatistics.of(load_file(path))
        return
    if not store.has(index):
        raise CheckpointError(
            f"{folder}: expected the hidden states of layer {index}, found none; --no-resume starts anew"
        )
    hidden = store.load(index)
    outputs, tensors = None, {}
    if layer is not None:
        routed = route(decoder, index, hidden, store)
        statistics = observe(decoder, layer, routed, hidden.shape[1], widths)
        found[layer.prefix], outputs = statistics, routed.outputs
        tensors = statistics.tensors()
        least, seen = int(statistics.tokens.min()), int(statistics.tokens.sum())
        dropped = f", {routed.dropped} tokens not finite" if routed.dropped else ""
        progress.line(f"{layer.prefix}: {seen:,} token slots, at least {least:,} per expert{dropped}")
    if index + 1 < len(decoder):
        finish(decoder, index, hidden, store.create(index + 1), outputs)
        store.complete(index + 1)
    write_tensors(path, tensors)
    store.drop(index)

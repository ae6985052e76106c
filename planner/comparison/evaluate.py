"""Quantize the compared models, run them over the held-out text, and score them."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from planner.calibration.reading.decoder import Decoder, compute_dtype
from planner.calibration.reading.routed import first_hidden
from planner.common.progress import duration
from planner.comparison.candidates import Candidate, CheckpointWeights, DenseWeights, RoundedWeights, Weights
from planner.comparison.entries import Entry
from planner.comparison.fallbacks import INDEX, count_fallbacks
from planner.comparison.forward import read_text
from planner.comparison.quantize_task import QuantizeTask
from planner.comparison.request import ComparisonRun
from planner.comparison.scores import score
from planner.comparison.slim import write_slim
from planner.evaluation.lm_eval_tasks import run_tasks
from planner.evaluation.perplexity import read_tokens
from planner.evaluation.reader_by_layer import read_layers
from planner.evaluation.scores import windows
from planner.output.files import write_json
from planner.quantization.runners.processes import ProcessRunner
from vllm_moeq.format import GRID, read_json

AT_A_TIME = 1 << 30
"""Maximum bytes of hidden states of the candidates that are evaluated together."""

ORIGINAL = "original"


def evaluate(run: ComparisonRun, found: Sequence[Entry], held_out: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return :func:`key_of` → scores for every distinct model, and the original's scores under :data:`ORIGINAL`.

    Args:
        run: the comparison run.
        found: the entries to compare.
        held_out: the held-out texts.

    Raises:
        MoeqError: a damaged tensor, a full disk, a task that lm-eval does not know.
    """
    ids = read_tokens(run.model.folder, held_out, run.wanted.max_tokens, "--held-out")
    tokens, targets = windows(ids, run.wanted.window)
    decoder = Decoder(run.model, run.layout, run.device, compute_dtype(run.device))
    store = first_hidden(decoder, tokens, run.folder)
    first, exact = store.load(0), read_layers(decoder, store, run.progress, "reading", {}, keep=(0,))
    if _known(run, ORIGINAL) is None:
        original = score(decoder, exact, exact[None], targets, [run.model.folder])[0].as_dict()
        _remember(run, ORIGINAL, original | _tasks(run, run.model.folder))
    distinct = {key_of(run, entry): entry for entry in found}
    missing = [(key, entry) for key, entry in distinct.items() if _known(run, key) is None]
    size = max(1, AT_A_TIME // (first.numel() * first.dtype.itemsize))
    for begin in range(0, len(missing), size):
        group = missing[begin : begin + size]
        run.progress.line(f"models {begin + 1} to {begin + len(group)} of {len(missing)}")
        _quantize_all(run, [entry for _, entry in group])
        candidates = [Candidate(key, _weights(run, decoder, entry), entry.odp) for key, entry in group]
        states = read_text(decoder, first, candidates, run.wanted.settings.linear, store, run.progress)
        names = [_label(entry) for _, entry in group]
        for (key, entry), value in zip(group, score(decoder, exact, states, targets, names), strict=True):
            folder = _folder(run, entry)
            more = _tasks(run, folder) if (folder / "config.json").is_file() else {}
            calibrated = run.wanted.settings.calibrated or entry.plan is None
            more["fallbacks"] = count_fallbacks(folder) if calibrated else None
            _remember(run, key, value.as_dict() | more)
        for folder in {_folder(run, entry) for _, entry in group}:
            if not any(_folder(run, entry) == folder for _, entry in missing[begin + size :]):
                shutil.rmtree(folder, ignore_errors=True)
    return {key: _known(run, key) or {} for key in (ORIGINAL, *distinct)}


def key_of(run: ComparisonRun, entry: Entry) -> str:
    """Return a key for an entry's model. Entries that lead to the same model share the key."""
    text = entry.seed if run.wanted.settings.calibrated or entry.plan is None else 0
    widths = entry.plan.experts if entry.plan else f"{entry.method} at {entry.average}"
    schemes = entry.plan.schemes if entry.plan else {}
    return hashlib.sha256(repr((widths, schemes, entry.odp, text)).encode()).hexdigest()[:16]


def _quantize_all(run: ComparisonRun, found: Sequence[Entry]) -> None:
    """Write the entries' checkpoints if the quantizer needs a text or tasks are evaluated, ``jobs`` at a time."""
    settings = run.wanted.settings
    if not settings.calibrated and not run.wanted.tasks:
        return
    tasks: dict[Path, QuantizeTask] = {}
    for entry in found:
        folder = _folder(run, entry)
        if entry.plan is not None and not folder.exists():
            own = entry.settings(run.wanted)
            label = f"{_label(entry)}: {own.quantizer}"
            text = run.text(entry.seed) if own.calibrated else None
            tasks[folder] = QuantizeTask(label, run.model.folder, entry.plan, folder, own, text)
    threads = torch.get_num_threads()
    if run.jobs == 1:
        for task in tasks.values():
            run.progress.line(task.label)
            task.run(threads, run.device)
        return
    runner = ProcessRunner(max(1, threads // run.jobs), [str(run.device)] * run.jobs)
    began = time.monotonic()
    with closing(runner.each(list(tasks.values()))) as results:
        for count, _ in enumerate(results, start=1):
            seconds = time.monotonic() - began
            left = duration(seconds / count * (len(tasks) - count))
            run.progress.line(f"quantized {count} of {len(tasks)}, {seconds:.0f} s, about {left} left")


def _label(entry: Entry) -> str:
    scheme = "" if entry.scheme == GRID.name else f" {entry.scheme}"
    return f"{entry.method}{scheme}, {float(entry.average):g} bits, seed {entry.seed}"


def _weights(run: ComparisonRun, decoder: Decoder, entry: Entry) -> Weights:
    """Return the experts of an entry: from a folder, or quantized on demand. Write the folder for an entry of slim."""
    settings, folder = run.wanted.settings, _folder(run, entry)
    if entry.plan is not None and (settings.calibrated or run.wanted.tasks):
        return CheckpointWeights(folder, settings.linears_calibrated)
    if entry.plan is not None:
        return RoundedWeights(entry.plan.experts, entry.settings(run.wanted))
    if not (folder / INDEX).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        tokens, bits = run.text(entry.seed).tokens, int(entry.average)
        write_slim(
            decoder, tokens, bits, settings.group_size, settings.linear, settings.min_tokens, folder, run.progress
        )
    return DenseWeights(folder)


def _tasks(run: ComparisonRun, folder: Path) -> dict[str, Any]:
    """Return the scores of the requested lm-eval tasks; an empty dict without tasks."""
    if not run.wanted.tasks:
        return {}
    found = run_tasks(folder, run.wanted.tasks, limit=run.wanted.limit, device=str(run.device))
    return {"tasks": {f"{entry.task} {entry.metric}": [entry.value, entry.stderr] for entry in found}}


def _folder(run: ComparisonRun, entry: Entry) -> Path:
    """Return the folder of an entry's experts. ODP does not change it."""
    return run.folder / f"model-{key_of(run, replace(entry, odp=0.0))}"


def _known(run: ComparisonRun, key: str) -> dict[str, Any] | None:
    path = run.folder / f"result-{key}.json"
    return read_json(path) if path.is_file() else None


def _remember(run: ComparisonRun, key: str, value: dict[str, Any]) -> None:
    write_json(run.folder / f"result-{key}.json", value)

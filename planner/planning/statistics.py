"""The statistics that a plan needs, collected on the way if only a text is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from planner.calibration.collect import StatisticsRequest, collect
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import CalibrationText, calibration_facts
from planner.calibration.statistics import json_path
from planner.common.interrupts import note_kept
from planner.common.progress import Progress
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.output.paths import check_file
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions, check_options
from vllm_moeq.format import UsageError, read_json


def wanted_statistics(options: PlanOptions) -> StatisticsRequest:
    """Return the statistics of a text that a plan needs."""
    return StatisticsRequest(options.measures, options.bit_choices, options.seed)


def reads_text(options: PlanOptions) -> bool:
    """Tell whether the plan needs statistics that are yet to be collected."""
    return METHODS[options.resolved_method].calibrated and options.stats is None and options.ranked


@contextmanager
def with_statistics(
    model: SourceModel,
    layout: Layout,
    options: PlanOptions,
    text: CalibrationText | None,
    device: torch.device,
    output: Path | None,
    progress: Progress,
    resume: bool = True,
) -> Iterator[PlanOptions]:
    """Yield the options with the statistics that their method needs, collected from a text.

    The options stay as they are if the method needs no statistics, if they are given already, or if there is no text.

    Args:
        model: the model.
        layout: its layers.
        options: the options of the plan.
        text: the calibration text, if any.
        device: device that runs the model.
        output: the command's output; the statistics are written beside it, where the same command finds them after it
            was killed, until :func:`discard_statistics`. None writes them to a temporary folder.
        progress: shows the progress.
        resume: use the files of a killed run.

    Raises:
        MoeqError: the options cannot be met, or the statistics are those of another run.
    """
    check_options(options)
    if text is None or not reads_text(options):
        yield options
        return
    facts = calibration_facts(text, device)
    wanted = wanted_statistics(options)
    kept: Path | None = None
    try:
        with TemporaryDirectory() as temporary:
            path = Path(temporary) / "statistics.safetensors" if output is None else _beside(output)
            kept = path if output is not None else path.parent
            check_file(json_path(path))
            if not _usable(path, model, facts, wanted, resume):
                dtype = compute_dtype(device)
                collect(model, layout, text, path, facts, device, dtype, progress, resume, wanted)
            yield replace(options, stats=path, temporary_stats=True)
    except BaseException:
        if kept is not None:
            note_kept(kept)  # the temporary folder is gone by now
        raise


def discard_statistics(output: Path) -> None:
    """Delete the statistics beside an output, if there are any: its plan is kept, and they are of no more use."""
    _remove(_beside(output))


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.statistics.safetensors")


def _usable(path: Path, model: SourceModel, facts: Mapping[str, Any], wanted: StatisticsRequest, resume: bool) -> bool:
    """Tell whether an earlier run left the statistics that this run needs.

    Raises:
        UsageError: it left others.
    """
    if not path.exists():
        return False
    if not resume:
        _remove(path)
        return False
    found = read_json(json_path(path))
    expected = {"model": model.fingerprint(), "calibration": dict(facts), **wanted.as_dict()}
    if not isinstance(found, dict) or any(found.get(key) != value for key, value in expected.items()):
        raise UsageError(f"{path}: expected the statistics of this run, found others; --no-resume deletes them")
    return True


def _remove(path: Path) -> None:
    json_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)

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
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions, check_options
from vllm_moeq.format import UsageError, read_json


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

    The statistics are deleted when the block succeeds. The options stay as they are if the method needs no statistics,
    if they are given already, or if there is no text.

    Args:
        model: the model.
        layout: its layers.
        options: the options of the plan.
        text: the calibration text, if any.
        device: device that runs the model.
        output: the command's output; the statistics are written beside it, where the same command finds them after it
            was killed. None writes them to a temporary folder.
        progress: shows the progress.
        resume: use the files of a killed run.

    Raises:
        MoeqError: the options cannot be met, or the statistics are those of another run.
    """
    check_options(options)
    method = METHODS[options.resolved_method]
    if not method.calibrated or options.stats is not None or not options.ranked or text is None:
        yield options
        return
    facts = calibration_facts(text, device)
    wanted = StatisticsRequest(method.measures, options.bit_choices, options.seed)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "statistics.safetensors"
        if output is not None:
            path = output.with_name(f"{output.name}.statistics.safetensors")
        if not _usable(path, model, facts, wanted, resume):
            dtype = compute_dtype(device)
            collect(model, layout, text, path, facts, device, dtype, progress, resume, wanted)
        try:
            yield replace(options, stats=path, temporary_stats=True)
        except BaseException:
            if output is not None:
                note_kept(path)
            raise
        _remove(path)


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

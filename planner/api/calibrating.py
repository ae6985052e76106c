"""``planner.calibrate``: statistics of every expert over a text, for many plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch

from planner.api import notes
from planner.api.call import takes
from planner.api.keywords.codes import SchemeKeyword
from planner.api.keywords.common import PathName, ProgressKeyword, parts
from planner.api.keywords.running import RunKeywords
from planner.api.keywords.text import TextKeywords
from planner.api.keywords.widths import WidthList, read_choices
from planner.api.results import Calibrated, Estimate
from planner.calibration.collect import StatisticsRequest, collect
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import CalibrationText, calibration_facts
from planner.calibration.statistics import json_path
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.estimates import Reading
from planner.estimates.parts import statistics_parts
from planner.estimates.quantizing import calibrate_needs
from planner.model.layout import Layout, read_layout
from planner.model.skeleton import open_model
from planner.model.source import SourceModel
from planner.output.paths import check_output
from planner.planning.methods import METHODS, OURS
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class CalibrateKeywords(ProgressKeyword, RunKeywords, TextKeywords, SchemeKeyword):
    """The arguments of :func:`calibrate`.

    Attributes:
        model: folder or Hub name (owner/name).
        output: statistics to write, .safetensors; plans take them as ``stats``.
        methods: methods that will use the statistics, such as ``("kl", "pmq")``; the flag ``--for``.
        bits: widths to measure, such as ``(1, 2, 3)``; None takes those of the methods.
        seed: seed of the choice of sequences, and of the measures' random draws.
    """

    model: PathName
    _: KW_ONLY
    output: PathName
    methods: Sequence[str] | str = OURS
    bits: WidthList | None = None
    seed: int = 0

    def request(self) -> StatisticsRequest:
        """Return the statistics to collect.

        Raises:
            UsageError: a method that does not exist or needs no text, or impossible widths.
        """
        known, names = [name for name, method in METHODS.items() if method.calibrated], parts(self.methods)
        for name in names:
            if name not in known:
                raise UsageError(f"--for: expected methods that use a text ({', '.join(known)}), found {name!r}")
        rows = [METHODS[name] for name in names]
        more = [(*row.other_measures(self.resolved_scheme), row.linears) for row in rows]
        wanted = [name for row, others in zip(rows, more, strict=True) for name in (*row.measures, *others) if name]
        measures = tuple(dict.fromkeys(wanted))
        own = tuple(sorted({width for name in names for width in METHODS[name].choices}))
        return StatisticsRequest(measures, own if self.bits is None else read_choices(self.bits), self.seed)


@dataclass(frozen=True)
class _Work:
    """An open model, and what is to be read.

    Attributes:
        source: the model.
        layout: its layers.
        request: the statistics to collect.
        text: the text.
        facts: what is kept of the text.
        device: the device that computes.
        progress: shows how far the work is.
    """

    source: SourceModel
    layout: Layout
    request: StatisticsRequest
    text: CalibrationText
    facts: dict[str, Any]
    device: torch.device
    progress: Progress

    @property
    def reading(self) -> Reading:
        """The numbers of sequences and tokens, for estimates."""
        return Reading(*self.text.tokens.shape)


@takes(CalibrateKeywords, "calibrate")
def calibrate(wanted: CalibrateKeywords) -> Calibrated:
    """Run a model over a text and write what each expert saw, as ``moeq calibrate`` does. Continue a killed run.

    Raises:
        MoeqError: arguments that cannot be met, a damaged model or text, a full disk; its message is one line.
    """
    output = Path(wanted.output)
    with _opened(wanted, dry_run=False) as work:
        source, layout, device, progress = work.source, work.layout, work.device, work.progress
        return_large_blocks()
        dtype = compute_dtype(device)
        with progress.whole():
            progress.expect(
                statistics_parts(
                    source.config, layout, work.reading, work.request.measures, work.request.widths, device
                )
            )
            found = collect(
                source, layout, work.text, output, work.facts, device, dtype, progress, wanted.resume, work.request
            )
    return Calibrated(output, work.facts, {prefix: layer.tokens.tolist() for prefix, layer in found.items()})


def estimate_calibrate(wanted: CalibrateKeywords) -> Estimate:
    """Return what reading the text would take, from the headers.

    Raises:
        MoeqError: as :func:`calibrate` does.
    """
    with _opened(wanted, dry_run=True) as work:
        return Estimate(calibrate_needs(work.source, work.layout, work.reading, work.request, work.device))


@contextmanager
def _opened(wanted: CalibrateKeywords, dry_run: bool) -> Iterator[_Work]:
    """Open the model, and yield it with what is to be read; close it at the end.

    Raises:
        MoeqError: arguments that cannot be met, a damaged model or text.
    """
    request, device, progress, output = wanted.request(), wanted.first_device(), wanted.display(), Path(wanted.output)
    if json_path(output) == output:
        raise UsageError(f"-o: {output}: expected a .safetensors file, found the name of its description")
    check_output(output)
    check_output(json_path(output))
    with open_model(str(wanted.model), dry_run) as source:
        layout = read_layout(source)
        notes.refuse_incomplete(source, layout, progress)
        text = wanted.read_text(source, wanted.seed, progress)
        yield _Work(source, layout, request, text, calibration_facts(text, device), device, progress)

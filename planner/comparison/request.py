"""The request for a comparison, and the state that its parts share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from planner.calibration.reading.text import CalibrationText, calibration_text, shortage
from planner.common.progress import Progress
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.quantization.quantizers.table import POSSIBLE, SchemeChoice
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        methods: names of methods, keys of ``METHODS``.
        averages: average bits per expert weight.
        bit_choices: widths in bits to choose from; None takes each method's own.
        settings: how to quantize; the seed changes the calibration text.
        data: calibration text, as ``--data`` takes it; None if nothing needs one.
        samples: number of calibration sequences.
        length: tokens per calibration sequence.
        seeds: number of seeds.
        window: tokens of context in the evaluation.
        max_tokens: maximum number of held-out tokens; None for all.
        tasks: names of lm-eval tasks, or task files.
        limit: maximum number of documents per task; None for all.
        odp: further ODP thresholds at which every plan is evaluated.
        schemes: the schemes of experts, in each of which every plan is made.
    """

    methods: tuple[str, ...]
    averages: tuple[Fraction, ...]
    bit_choices: tuple[int, ...] | None
    settings: QuantizeSettings
    data: str | None
    samples: int = 128
    length: int = 512
    seeds: int = 1
    window: int = 512
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    odp: tuple[float, ...] = ()
    schemes: tuple[SchemeChoice, ...] = ("grid",)

    def settings_of(self, scheme: SchemeChoice) -> QuantizeSettings:
        """Return the settings for a scheme before there is a plan: a grid's bound the sizes of ``auto``."""
        return replace(self.settings, scheme=POSSIBLE[scheme][0])

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        found = {**vars(self), "averages": [str(average) for average in self.averages]}
        return {**found, "settings": self.settings.as_dict()}


@dataclass
class ComparisonRun:
    """The state that the parts of a comparison share.

    ``folder`` holds unfinished results, so that a later run can continue. ``jobs`` models are quantized at a time.
    """

    model: SourceModel
    layout: Layout
    wanted: Comparison
    folder: Path
    device: torch.device
    progress: Progress
    jobs: int = 1
    texts: dict[int, CalibrationText] = field(default_factory=dict)

    def text(self, seed: int) -> CalibrationText:
        """Return the calibration text for a seed.

        Raises:
            UsageError: the comparison has no calibration text.
        """
        if self.wanted.data is None:
            raise UsageError("--data: expected a calibration text for these methods, found none")
        if seed not in self.texts:
            wanted = self.wanted
            self.texts[seed] = calibration_text(
                self.model.folder, self.wanted.data, wanted.samples, wanted.length, seed
            )
            note = shortage(self.texts[seed], wanted.samples)
            if note is not None:
                self.progress.line(note)
        return self.texts[seed]

"""The parts of a run for its progress, each with the seconds that it is expected to take on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from planner.calibration.measures import COUNTING_PASSES, MEASURES, READING
from planner.common.schedule import Part
from planner.estimates.memory import Reading
from planner.estimates.quantizing import quantizing_seconds
from planner.estimates.seconds import reading_seconds, searching_seconds, variance_seconds
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions
from planner.planning.scores import SCORING
from planner.planning.statistics import reads_text
from planner.quantization.run import QUANTIZING
from planner.quantization.settings import QuantizeSettings


def statistics_parts(
    config: Mapping[str, Any],
    layout: Layout,
    reading: Reading,
    measures: Sequence[str],
    widths: Sequence[int],
    device: torch.device,
) -> list[Part]:
    """Return the parts of collecting statistics from a text."""
    one = reading_seconds(config, layout, replace(reading, streams=0), 1.0, device)
    meanwhile, later = COUNTING_PASSES, list[Part]()
    for measure in measures:
        parts = MEASURES[measure].parts(layout, reading.tokens)
        search = searching_seconds(layout, [measure], widths, device) / len(parts)
        meanwhile += sum(passes for name, passes in parts if name == READING)
        later += [(name, one * passes + search) for name, passes in parts if name != READING]
    return [(READING, one * meanwhile), *later]


def planning_parts(
    model: SourceModel, layout: Layout, options: PlanOptions, reading: Reading | None, device: torch.device
) -> list[Part]:
    """Return the parts of making a plan."""
    method = METHODS[options.resolved_method]
    parts: list[Part] = []
    if reading is not None and reads_text(options):
        parts = statistics_parts(model.config, layout, reading, options.measures, options.bit_choices, device)
    seconds = variance_seconds(model, layout, torch.get_num_threads()) if "max_var" in method.metrics else 0.0
    return [*parts, (SCORING, seconds)]


def quantizing_parts(
    model: SourceModel,
    layout: Layout,
    experts: Mapping[str, Sequence[int]],
    settings: QuantizeSettings,
    devices: Sequence[torch.device],
    reading: Reading | None,
) -> list[Part]:
    """Return the part of quantizing by a plan."""
    return [(QUANTIZING, quantizing_seconds(model.config, layout, experts, settings, devices, reading))]


def even_widths(layout: Layout, options: PlanOptions) -> dict[str, list[int]]:
    """Return one width for all experts, near the average, as long as there is no plan."""
    bits = min(options.bit_choices, key=lambda width: abs(width - options.avg_bits))
    return {layer.prefix: [bits] * layer.num_experts for layer in layout.layers}

"""Estimate the needs of ``moeq quantize``, ``moeq calibrate`` and ``moeq plan``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from planner.calibration.collect import StatisticsRequest
from planner.calibration.measures import COUNTING_PASSES, MEASURES
from planner.common.memory import resident_bytes
from planner.estimates.memory import Reading, device_working, hidden_bytes, reading_ram, rounding_ram
from planner.estimates.needs import Needs
from planner.estimates.seconds import reading_seconds, rounding_seconds, searching_seconds, variance_seconds
from planner.estimates.written import quantized_bytes
from planner.model.layout import Layout
from planner.model.sizes import Sizes
from planner.model.skeleton import ConfigModel
from planner.model.source import SourceModel
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions
from planner.planning.statistics import wanted_statistics
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import BIT_WIDTHS

PLAN_BYTES, SCORE_BYTES = 90, 28
"""Bytes in plan.json per expert, for its width and place, and per score of an expert."""

STATISTICS_BYTES, COUNTS = 8, 4
"""Bytes of a value in the statistics, and number of values that every expert has."""


def passes_of(layout: Layout, measures: Sequence[str], tokens: int) -> float:
    """Return the number of passes of a text of some tokens through the model that some measures need."""
    return COUNTING_PASSES + sum(MEASURES[name].passes(layout, tokens) for name in measures)


def quantize_needs(
    model: SourceModel,
    layout: Layout,
    experts: Mapping[str, Sequence[int]],
    sizes: Sizes,
    settings: QuantizeSettings,
    devices: Sequence[torch.device],
    reading: Reading | None = None,
    wanted: StatisticsRequest | None = None,
) -> Needs:
    """Return the needs of ``moeq quantize``.

    Args:
        model: the source.
        layout: the source's layout.
        experts: experts prefix → bits per expert.
        sizes: sizes of the output.
        settings: how to quantize.
        devices: devices that quantize experts, one per job.
        reading: run over the calibration text; None without a text.
        wanted: the statistics of the text that the plan needs; None for none.
    """
    device, config = devices[0], model.config
    jobs = 1 if reading is not None and reading.gptq else len(devices)
    ram = rounding_ram(layout, sizes, settings.storage.scheme.row_step, torch.get_num_threads(), jobs)
    seconds = quantizing_seconds(config, layout, experts, settings, devices, reading)
    if reading is not None:
        ram = max(ram, reading_ram(config, layout, reading, sizes, device.type))
        if wanted is not None:
            seconds += _collecting_seconds(config, layout, replace(reading, streams=0), wanted, device)
    return Needs(
        written_bytes=quantized_bytes(model, layout, sizes, settings.linear, settings.storage),
        temporary_bytes=hidden_bytes(config, reading) if reading is not None else 0,
        ram_bytes=ram,
        device_bytes=_device_bytes(model, layout, reading, device),
        seconds=seconds,
    )


def quantizing_seconds(
    config: Mapping[str, Any],
    layout: Layout,
    experts: Mapping[str, Sequence[int]],
    settings: QuantizeSettings,
    devices: Sequence[torch.device],
    reading: Reading | None,
) -> float:
    """Return the seconds of quantizing by a plan; the arguments are those of :func:`quantize_needs`."""
    device = devices[0]
    workers = torch.get_num_threads() if device.type == "cpu" else len(devices)
    calibrated = reading is not None and reading.gptq
    seconds = rounding_seconds(layout, experts, settings, workers, device, grids=not calibrated)
    if reading is not None and calibrated:
        seconds += reading_seconds(config, layout, reading, COUNTING_PASSES, device)
    return seconds


def calibrate_needs(
    model: SourceModel,
    layout: Layout,
    reading: Reading,
    wanted: StatisticsRequest,
    device: torch.device,
) -> Needs:
    """Return the needs of ``moeq calibrate``."""
    names = sum(len(MEASURES[name].all_names(BIT_WIDTHS)) for name in wanted.measures)
    written = STATISTICS_BYTES * (names + COUNTS) * layout.num_experts
    return _reading_needs(model, layout, reading, wanted, device, written)


def plan_needs(
    model: SourceModel, layout: Layout, options: PlanOptions, reading: Reading | None, device: torch.device
) -> Needs:
    """Return the needs of ``moeq plan``: running the model over a text, or reading weights."""
    method = METHODS[options.resolved_method]
    scores = len(method.metrics) + sum(len(MEASURES[name].all_names(options.bit_choices)) for name in options.measures)
    written = (PLAN_BYTES + SCORE_BYTES * scores) * layout.num_experts
    if reading is not None and method.calibrated and options.stats is None:
        return _reading_needs(model, layout, reading, wanted_statistics(options), device, written)
    known = "max_var" in method.metrics and not isinstance(model, ConfigModel)
    seconds = variance_seconds(model, layout, torch.get_num_threads()) if known else 0.0
    return Needs(written, 0, resident_bytes(), 0, seconds)


def _reading_needs(
    model: SourceModel,
    layout: Layout,
    reading: Reading,
    wanted: StatisticsRequest,
    device: torch.device,
    written: int,
) -> Needs:
    config = model.config
    return Needs(
        written_bytes=written,
        temporary_bytes=hidden_bytes(config, reading),
        ram_bytes=reading_ram(config, layout, reading, None, device.type),
        device_bytes=_device_bytes(model, layout, reading, device),
        seconds=_collecting_seconds(config, layout, reading, wanted, device),
    )


def _collecting_seconds(
    config: Mapping[str, Any], layout: Layout, reading: Reading, wanted: StatisticsRequest, device: torch.device
) -> float:
    seconds = reading_seconds(config, layout, reading, passes_of(layout, wanted.measures, reading.tokens), device)
    return seconds + searching_seconds(layout, wanted.measures, wanted.widths, device)


def _device_bytes(model: SourceModel, layout: Layout, reading: Reading | None, device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    shapes = Reading(1, 1) if reading is None else reading
    return device_working(model.config, layout, shapes, device.type)

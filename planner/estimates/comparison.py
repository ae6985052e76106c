"""Estimate the needs of ``moeq compare``: statistics, quantization of all models, and evaluation on held-out text."""

from __future__ import annotations

from dataclasses import replace

from planner.calibration.kl.gradients import head_rows
from planner.calibration.reading.decoder import compute_dtype
from planner.common.memory import resident_bytes
from planner.comparison.entries import choices_of, gives, measures_of, schemes_of, varies
from planner.comparison.evaluate import AT_A_TIME
from planner.comparison.request import ComparisonRun
from planner.estimates.memory import FLOAT, Reading, hidden_bytes, reading_ram
from planner.estimates.needs import Needs, largest
from planner.estimates.quantizing import passes_of, quantize_needs
from planner.estimates.seconds import reading_seconds
from planner.estimates.serving import text_config
from planner.evaluation.passes import FILES, LOGITS_BESIDE
from planner.model.sizes import estimate
from planner.planning.methods import METHODS
from planner.quantization.quantizers.table import POSSIBLE, SchemeChoice
from vllm_moeq.format import BIT_WIDTHS

ROW_BYTES, PLOT_BYTES = 1024, 96 << 10
"""Bytes of a row in table, CSV and JSON together, and of the plot."""


def compare_needs(run: ComparisonRun, tokens: int) -> Needs:
    """Return the needs of a comparison. They are upper bounds: methods that choose the same widths share a model.

    Args:
        run: the comparison; only headers are read.
        tokens: number of tokens of the held-out text.
    """
    wanted, config = run.wanted, run.model.config
    models = {scheme: sum(_models(run, name, scheme) for name in wanted.methods) for scheme in wanted.schemes}
    rows = sum(models.values()) * (1 + len(wanted.odp))
    gptq = wanted.settings.calibrated
    text = Reading(wanted.samples, wanted.length, wanted.settings.streams, wanted.settings.sweeps)
    each, passes = {it: _quantizing(run, text if gptq else None, it) for it in models}, _statistics_passes(run)
    one = max(each.values(), key=lambda needs: needs.written_bytes)
    stored = gptq or bool(wanted.tasks)
    state = compute_dtype(run.device).itemsize * tokens * int(text_config(config).get("hidden_size") or 0)
    together = min(rows, max(1, AT_A_TIME // max(1, state)))
    states = state * (2 + FILES * together)
    ram = max(needs.ram_bytes for needs in each.values())
    seconds = sum(each[it].seconds * count for it, count in models.items()) / (run.jobs if stored else 1)
    held_out = Reading(max(1, tokens // wanted.window), wanted.window)
    for reading, count in ((replace(text, streams=0), passes), (held_out, 1.0 + rows)):
        seconds += reading_seconds(config, run.layout, reading, count, run.device) if count else 0.0
    return Needs(
        written_bytes=PLOT_BYTES + ROW_BYTES * (1 + rows),
        temporary_bytes=states + together * one.written_bytes * stored + hidden_bytes(config, text) * (passes > 0),
        ram_bytes=max(_evaluation_ram(run, tokens, states), _making_ram(run, text, passes, ram * stored)),
        device_bytes=one.device_bytes,
        seconds=seconds,
    )


def _models(run: ComparisonRun, name: str, scheme: SchemeChoice) -> int:
    """Return the number of models of a method in a scheme; what has grids alone counts with the first scheme."""
    known, wanted = schemes_of(run, name), run.wanted.schemes
    if scheme not in (known if set(known) <= set(wanted) else wanted[:1]):
        return 0
    averages = sum(gives(name, average) for average in run.wanted.averages)
    return averages * (run.wanted.seeds if varies(name) else 1)


def _quantizing(run: ComparisonRun, reading: Reading | None, scheme: SchemeChoice) -> Needs:
    """Return the needs of quantizing one model in a scheme with the mean budget for all experts."""
    wanted = run.wanted
    mean = round(sum(wanted.averages) / len(wanted.averages))
    bits = min(BIT_WIDTHS, key=lambda width: (abs(width - mean), -width))
    experts = {layer.prefix: [bits] * layer.num_experts for layer in run.layout.layers}
    found = []
    for settings in map(wanted.settings_of, POSSIBLE[scheme]):
        sizes = estimate(run.model, run.layout, experts, settings.group_size, settings.linear, settings.storage)
        found.append(quantize_needs(run.model, run.layout, experts, sizes, settings, [run.device], reading))
    return largest(found)


def _statistics_passes(run: ComparisonRun) -> float:
    """Return the number of forward passes over calibration texts. Methods with equal measures share statistics."""
    distinct = {
        (measures_of(run, name), choices_of(run, name) if METHODS[name].measures else ())
        for name in run.wanted.methods
        if METHODS[name].calibrated
    }
    tokens = run.wanted.samples * run.wanted.length
    return run.wanted.seeds * sum(passes_of(run.layout, measures, tokens) for measures, _ in distinct)


def _evaluation_ram(run: ComparisonRun, tokens: int, states: int) -> int:
    """Return the memory in bytes for reading the held-out text: hidden states of all candidates, and logits."""
    vocabulary = int(text_config(run.model.config).get("vocab_size") or 1)
    logits = LOGITS_BESIDE * FLOAT * vocabulary * min(tokens, head_rows(vocabulary))
    return resident_bytes() + states + (logits if run.device.type == "cpu" else 0)


def _making_ram(run: ComparisonRun, text: Reading, passes: float, quantizing: int) -> int:
    """Return the memory in bytes for statistics, or for the models that are quantized at a time if that is more."""
    own = resident_bytes()
    statistics = 0
    if passes:
        statistics = reading_ram(run.model.config, run.layout, replace(text, streams=0), None, run.device.type)
    return max(statistics, quantizing if run.jobs == 1 else own + run.jobs * quantizing)

"""Collect further values per expert: from the folder, its plan, its report, or the source model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from planner.model.layout import read_layout
from planner.model.recognize import find_architecture
from planner.model.source import SourceModel
from planner.planning.scores import METRICS, READERS
from planner.quantization.record import ExpertRecord
from planner.quantization.rows import open_threads
from planner.reporting.facts import Facts
from planner.sensitivity import router_norm
from vllm_moeq.format import ShardSet, UsageError

Values = tuple[tuple[float | None, ...], ...]
"""Values [layers][experts]; None marks a missing value."""


@dataclass(frozen=True)
class ValueMap:
    """One quantity with a value per expert.

    Attributes:
        key: name of the quantity in JSON.
        title: name of the quantity for people.
        meaning: definition in one line.
        unit: unit of the shown values.
        values: see :data:`Values`.
    """

    key: str
    title: str
    meaning: str
    unit: str
    values: Values


@dataclass(frozen=True)
class ValueMaps:
    """The known quantities, and a line for every missing one that says how to get it."""

    known: tuple[ValueMap, ...]
    missing: tuple[str, ...]


def collect_maps(facts: Facts, source: SourceModel | None = None) -> ValueMaps:
    """Return every quantity that can be read or computed from the folder and the source model.

    Args:
        facts: facts about the checkpoint.
        source: the source model, to compute MaxVar if the plan has none; None to skip that.

    Raises:
        MoeqError: the source has other layers, or a router is damaged.
    """
    known: list[ValueMap] = []
    missing: list[str] = []

    def add(grid: ValueMap, otherwise: str) -> None:
        if any(value is not None for row in grid.values for value in row):
            known.append(grid)
        else:
            missing.append(f"{grid.title}: {otherwise}")

    add(_norms(facts), "the architecture’s routers are not known")
    add(
        ValueMap("max_var", "MaxVar", "largest variance of a neuron’s input weights", "", _variances(facts, source)),
        "the method did not need it; moeq report DIR --model SOURCE computes it from the source model",
    )
    add(
        ValueMap("tokens", "Routed tokens", "calibration tokens that chose the expert", "tokens", _tokens(facts)),
        "nothing was calibrated; moeq quantize --data TEXT counts them",
    )
    errors = _of_experts(facts, lambda entry: _percent(entry.relative_error))
    add(
        ValueMap("relative_error", "Error of weights", "‖W − Ŵ‖ / ‖W‖ over the expert’s matrices", "%", errors),
        "the folder has no quantization_report.json",
    )
    errors = _of_experts(facts, lambda entry: _percent(entry.output_error))
    add(
        ValueMap("output_error", "Error of outputs", "‖Y − Ŷ‖ / ‖Y‖ on its calibration tokens", "%", errors),
        "GPTQ measures it; moeq quantize --data TEXT",
    )
    return ValueMaps(tuple(known), tuple(missing))


def _norms(facts: Facts) -> ValueMap:
    values = _from_plan(facts, "router_norm")
    change = facts.plan is not None and facts.plan.settings.initial_model is not None and values is not None
    meaning = "change of ‖w‖₂ of the router’s row in training" if change else "‖w‖₂ of the router’s row"
    return ValueMap("router_norm", "Router norm", meaning, "", values or _router_norms(facts))


def _router_norms(facts: Facts) -> Values:
    """Compute the norms from the checkpoint's routers, which are not quantized."""
    row = find_architecture(facts.model)
    result = []
    with ShardSet(facts.folder) as shards:
        for layer in facts.layers:
            name = layer.prefix.removesuffix(row.experts) + row.router if row else ""
            info = shards.tensors.get(name)
            usable = info is not None and len(info.shape) == 2 and info.shape[0] == len(layer.widths)
            result.append(_finite(router_norm(shards.load(name))) if usable else (None,) * len(layer.widths))
    return tuple(result)


def _variances(facts: Facts, source: SourceModel | None) -> Values:
    values = _from_plan(facts, "max_var")
    if values is not None:
        return values
    if source is None:
        return tuple((None,) * len(layer.widths) for layer in facts.layers)
    layout = read_layout(source)
    found = {layer.prefix: layer.num_experts for layer in layout.layers}
    if found != {layer.prefix: len(layer.widths) for layer in facts.layers}:
        raise UsageError(f"--model: {source.folder}: expected the MoE layers and experts of {facts.folder}")
    with open_threads(min(torch.get_num_threads(), READERS)) as threads:
        scores = METRICS["max_var"](source, layout, None, threads.pool)
        by_prefix = {layer.prefix: _finite(next(scores)["max_var"]) for layer in layout.layers}
    return tuple(by_prefix[layer.prefix] for layer in facts.layers)


def _tokens(facts: Facts) -> Values:
    found = _of_experts(facts, lambda entry: entry.tokens)
    counted = any(value is not None for row in found for value in row)
    return found if counted else _from_plan(facts, "tokens") or found


def _from_plan(facts: Facts, name: str) -> Values | None:
    """Return the plan's scores of one name; None unless the plan has them for all experts."""
    scores: Mapping[str, Mapping[str, Sequence[float]]] = facts.plan.scores if facts.plan else {}
    rows = [scores.get(layer.prefix, {}).get(name, ()) for layer in facts.layers]
    if any(len(row) != len(layer.widths) for row, layer in zip(rows, facts.layers, strict=True)):
        return None
    return tuple(map(_finite, rows))


def _of_experts(facts: Facts, value: Callable[[ExpertRecord], float | None]) -> Values:
    result = []
    for layer in facts.layers:
        entries = facts.recorded.experts(layer.prefix)
        row = [value(entries[expert]) if expert in entries else None for expert in range(len(layer.widths))]
        result.append(_finite(row))
    return tuple(result)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _finite(values: Sequence[float | None]) -> tuple[float | None, ...]:
    return tuple(value if value is not None and math.isfinite(value) else None for value in values)

"""Statistics of every expert on a calibration text (counts, gate weights, second moments), and their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.rounded import rounded
from planner.calibration.reading.routed import Routed
from planner.model.layout import Layout, MoeLayer
from planner.output.files import write_json, write_tensors
from vllm_moeq.format import CheckpointError, read_json
from vllm_moeq.format.headers import read_header

VERSION = 1

LINEARS = "linears"
"""Prefix of the values of groups of linears in the file, in the order of
:func:`planner.model.linear_groups.linear_groups`."""


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one MoE layer with E experts, hidden size H and intermediate size I.

    Attributes:
        tokens: number of calibration tokens routed to each expert, int64 [E].
        gate_probability: softmax over all experts, summed over the expert's tokens, float32 [E] (PMQ's w).
        routing_weight: weight that the router applies, summed over the expert's tokens, float32 [E].
        input_square: mean square of each input channel of gate and up, float32 [E, H].
        inner_square: mean square of each input channel of down, float32 [E, I].
        output_square: Σ over tokens of ‖weighted output‖², float32 [E].
        measured: other requested values, float32 [E] each (:mod:`planner.calibration.measures`). ``error_<bits>`` is ε
            of PMQ (MC-MoE): the Frobenius norm of the change in the block's output when only this expert is rounded,
            summed over sequences.
    """

    tokens: torch.Tensor
    gate_probability: torch.Tensor
    routing_weight: torch.Tensor
    input_square: torch.Tensor
    inner_square: torch.Tensor
    output_square: torch.Tensor
    measured: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors under their names in the file."""
        return {name: getattr(self, name) for name in NAMES} | self.measured

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> LayerStatistics:
        """Undo :meth:`tensors`."""
        measured = {name: value for name, value in tensors.items() if name not in NAMES}
        return cls(**{name: tensors[name] for name in NAMES}, measured=measured)


NAMES = ("tokens", "gate_probability", "routing_weight", "input_square", "inner_square", "output_square")


def observe(
    decoder: Decoder, layer: MoeLayer, routed: Routed, sequence: int = 0, widths: Sequence[int] = ()
) -> LayerStatistics:
    """Run a layer's experts on their tokens, add their outputs to ``routed``, and return their statistics.

    Args:
        decoder: the model.
        layer: the MoE layer.
        routed: the tokens routed to its experts.
        sequence: number of tokens in a calibration sequence; needed with ``widths``.
        widths: bit widths to measure rounding errors for.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    rows, columns = layer.shapes[layer.projections.gate]
    found = LayerStatistics(
        tokens=torch.zeros(layer.num_experts, dtype=torch.int64),
        gate_probability=torch.zeros(layer.num_experts),
        routing_weight=torch.zeros(layer.num_experts),
        input_square=torch.zeros(layer.num_experts, columns),
        inner_square=torch.zeros(layer.num_experts, rows),
        output_square=torch.zeros(layer.num_experts),
        measured={f"error_{bits}": torch.zeros(layer.num_experts) for bits in widths},
    )
    for expert in range(layer.num_experts):
        tokens, slots = routed.slots(expert)
        found.tokens[expert] = tokens.numel()
        found.gate_probability[expert] = routed.probabilities[tokens, slots].sum()
        found.routing_weight[expert] = routed.weights[tokens, slots].sum()
        if not tokens.numel():
            continue
        weights = load_expert(decoder.model, layer, expert, decoder.device, decoder.dtype)
        squares = {bits: torch.zeros(routed.ids.shape[0] // sequence) for bits in widths}
        others = {bits: rounded(weights, bits) for bits in widths}
        for inputs, share, places in routed.chunks(expert, decoder.device):
            inner = weights.inner(inputs, decoder.activation)
            output = weights.outputs(inner).float() * share[:, None]
            routed.add(places, output)
            for bits, other in others.items():
                changed = other(inputs, decoder.activation).float() * share[:, None]
                difference = changed.sub_(output).square_().sum(dim=1).cpu()
                squares[bits].index_add_(0, places // sequence, difference)
            found.input_square[expert] += inputs.float().square().sum(dim=0).cpu()
            found.inner_square[expert] += inner.float().square().sum(dim=0).cpu()
            found.output_square[expert] += output.square().sum().cpu()
        found.input_square[expert] /= tokens.numel()
        found.inner_square[expert] /= tokens.numel()
        for bits, square in squares.items():
            found.measured[f"error_{bits}"][expert] = square.sqrt().sum()
    return found


def write_statistics(
    path: Path,
    layers: dict[str, LayerStatistics],
    facts: dict[str, Any],
    linears: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``path`` and the JSON file beside it, both new, each atomically.

    Args:
        path: the file of tensors ``<experts prefix>.<name>``, and ``linears.<name>``.
        layers: experts prefix → statistics.
        facts: the description.
        linears: name → one value per group of linears.

    Raises:
        CheckpointError: a full disk, or somebody made one of them meanwhile; neither is written.
    """
    tensors = {f"{prefix}.{name}": value for prefix, layer in layers.items() for name, value in layer.tensors().items()}
    tensors |= {f"{LINEARS}.{name}": value for name, value in (linears or {}).items()}
    write_json(json_path(path), {"version": VERSION, **facts}, new=True)
    try:
        write_tensors(path, tensors, new=True)
    except BaseException:
        json_path(path).unlink(missing_ok=True)
        raise


def json_path(path: Path) -> Path:
    """Return the path of the JSON description of a statistics file."""
    return path.with_suffix(".json")


def described_widths(path: Path) -> list[Any]:
    """Return the widths that the description of a statistics file names, unchecked; none where it does not say.

    Raises:
        ConfigError: the description is no JSON.
    """
    facts = read_json(json_path(path)) if json_path(path).is_file() else {}
    found = facts.get("widths") if isinstance(facts, dict) else None
    return found if isinstance(found, list) else []


def read_statistics(path: Path, layout: Layout) -> tuple[dict[str, LayerStatistics], dict[str, Any]]:
    """Read a statistics file and check it against a model's layout.

    Returns:
        Experts prefix → statistics, and the description.

    Raises:
        MoeqError: the file has another version, or a tensor is missing, has another shape or is not finite.
    """
    facts = read_json(json_path(path))
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise CheckpointError(f"{json_path(path)}: expected statistics of version {VERSION}")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a statistics file, found none")
    read_header(path)
    layers = {}
    try:
        with safe_open(str(path), framework="pt") as handle:
            present = set(handle.keys())
            for layer in layout.layers:
                missing = [name for name in NAMES if f"{layer.prefix}.{name}" not in present]
                if missing:
                    why = ": the statistics are those of another model" if len(missing) == len(NAMES) else ""
                    raise CheckpointError(f"{path}: tensor {layer.prefix}.{missing[0]} is missing{why}")
                found = (
                    name.removeprefix(f"{layer.prefix}.") for name in present if name.startswith(f"{layer.prefix}.")
                )
                names = (*NAMES, *sorted(set(found) - set(NAMES)))
                layers[layer.prefix] = LayerStatistics.of({name: _read(handle, path, layer, name) for name in names})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read ({error})") from None
    return layers, facts


def _read(handle: Any, path: Path, layer: MoeLayer, name: str) -> torch.Tensor:
    rows, columns = layer.shapes[layer.projections.gate]
    more = {"input_square": [columns], "inner_square": [rows]}.get(name, [])
    kind = "I64" if name == "tokens" else "F32"
    return _value(handle, path, f"{layer.prefix}.{name}", [layer.num_experts, *more], kind)


def _value(handle: Any, path: Path, full: str, expected: list[int], kind: str) -> torch.Tensor:
    """Return a tensor of a file; raise CheckpointError for one of another shape or dtype, or that is not finite."""
    found = handle.get_slice(full)
    if found.get_shape() != expected or found.get_dtype() != kind:
        raise CheckpointError(
            f"{path}: tensor {full}: expected {expected}, found {found.get_dtype()} {found.get_shape()}"
        )
    value: torch.Tensor = handle.get_tensor(full)
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{path}: tensor {full}: expected finite values")
    return value


def read_linears(path: Path, names: Sequence[str], groups: int) -> dict[str, list[float]]:
    """Return name → one value per group of linears, of a file that :func:`read_statistics` has read.

    A name that the file does not have is missing in the result too.

    Args:
        path: the file.
        names: names of values.
        groups: number of the model's groups.

    Raises:
        CheckpointError: values of another model, or values that are not finite.
    """
    found: dict[str, list[float]] = {}
    try:
        with safe_open(str(path), framework="pt") as handle:
            present = set(handle.keys())
            for name in names:
                full = f"{LINEARS}.{name}"
                if full in present:
                    found[name] = _value(handle, path, full, [groups], "F32").double().tolist()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read ({error})") from None
    return found

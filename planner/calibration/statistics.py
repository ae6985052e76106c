"""What calibration text says of every expert: counts, gate weights, second moments. Their file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from planner.calibration.decoder import Decoder
from planner.calibration.experts import load_expert
from planner.calibration.routed import Routed
from planner.files import write_json, write_tensors
from planner.models import Layout, MoeLayer
from vllm_moeq.format import CheckpointError, read_json

VERSION = 1


@dataclass(frozen=True)
class LayerStatistics:
    """One MoE layer; E experts, hidden size H, intermediate size I.

    Attributes:
        tokens: calibration tokens routed to each expert, int64 [E].
        gate_probability: Σ over those of the softmax over all experts, float32 [E] (PMQ's w).
        routing_weight: Σ over those of the weight that the router applies, float32 [E].
        input_square: mean square of each input channel of gate and up, float32 [E, H].
        inner_square: mean square of each input channel of down, float32 [E, I].
        output_square: Σ over tokens of ‖weighted output‖², float32 [E].
    """

    tokens: torch.Tensor
    gate_probability: torch.Tensor
    routing_weight: torch.Tensor
    input_square: torch.Tensor
    inner_square: torch.Tensor
    output_square: torch.Tensor


NAMES = tuple(field.name for field in fields(LayerStatistics))


def observe(decoder: Decoder, layer: MoeLayer, routed: Routed) -> LayerStatistics:
    """Run the experts of a layer on their tokens, add their outputs to ``routed``, and return what they saw.

    Raises:
        CheckpointError: a tensor that cannot be read.
    """
    rows, columns = layer.shapes[layer.projections.gate]
    found = LayerStatistics(
        tokens=torch.zeros(layer.num_experts, dtype=torch.int64),
        gate_probability=torch.zeros(layer.num_experts),
        routing_weight=torch.zeros(layer.num_experts),
        input_square=torch.zeros(layer.num_experts, columns),
        inner_square=torch.zeros(layer.num_experts, rows),
        output_square=torch.zeros(layer.num_experts),
    )
    for expert in range(layer.num_experts):
        tokens, slots = routed.slots(expert)
        found.tokens[expert] = tokens.numel()
        found.gate_probability[expert] = routed.probabilities[tokens, slots].sum()
        found.routing_weight[expert] = routed.weights[tokens, slots].sum()
        if not tokens.numel():
            continue
        weights = load_expert(decoder.model, layer, expert, decoder.device, decoder.dtype)
        for inputs, share, places in routed.chunks(expert, decoder.device):
            inner = weights.inner(inputs, decoder.activation)
            output = (inner @ weights.down.mT).float() * share[:, None]
            routed.add(places, output)
            found.input_square[expert] += inputs.float().square().sum(dim=0).cpu()
            found.inner_square[expert] += inner.float().square().sum(dim=0).cpu()
            found.output_square[expert] += output.square().sum().cpu()
        found.input_square[expert] /= tokens.numel()
        found.inner_square[expert] /= tokens.numel()
    return found


def write_statistics(path: Path, layers: dict[str, LayerStatistics], facts: dict[str, Any]) -> None:
    """Write ``path`` (tensors ``<experts prefix>.<name>``) and the JSON file beside it, each atomically."""
    tensors = {f"{prefix}.{name}": getattr(layer, name) for prefix, layer in layers.items() for name in NAMES}
    write_json(json_path(path), {"version": VERSION, **facts})
    write_tensors(path, tensors)


def json_path(path: Path) -> Path:
    """Return where the description of a statistics file is."""
    return path.with_suffix(".json")


def read_statistics(path: Path, layout: Layout) -> tuple[dict[str, LayerStatistics], dict[str, Any]]:
    """Read a statistics file for a model.

    Returns:
        Experts prefix → statistics, and the description.

    Raises:
        MoeqError: another version, or a tensor that is missing, has another shape or is not finite.
    """
    facts = read_json(json_path(path))
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise CheckpointError(f"{json_path(path)}: expected statistics of version {VERSION}")
    layers = {}
    try:
        with safe_open(str(path), framework="pt") as handle:
            for layer in layout.layers:
                layers[layer.prefix] = LayerStatistics(**{name: _read(handle, path, layer, name) for name in NAMES})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read ({error})") from None
    return layers, facts


def _read(handle: Any, path: Path, layer: MoeLayer, name: str) -> torch.Tensor:
    rows, columns = layer.shapes[layer.projections.gate]
    more = {"input_square": [columns], "inner_square": [rows]}.get(name, [])
    expected = [layer.num_experts, *more]
    full = f"{layer.prefix}.{name}"
    found = handle.get_slice(full)
    if found.get_shape() != expected or found.get_dtype() != ("I64" if name == "tokens" else "F32"):
        raise CheckpointError(
            f"{path}: tensor {full}: expected {expected}, found {found.get_dtype()} {found.get_shape()}"
        )
    value: torch.Tensor = handle.get_tensor(full)
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{path}: tensor {full}: expected finite values")
    return value

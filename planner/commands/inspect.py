"""``moeq inspect``: show the parts of a model."""

from __future__ import annotations

from typing import Any

from planner.commands import show
from planner.commands.flags.common import Json, Model
from planner.model.hub import resolve_model
from planner.model.layout import Layout, read_layout
from planner.model.source import SourceModel
from planner.sensitivity import router_norm


def inspect_command(model: Model, as_json: Json = False) -> None:
    """Show a model's MoE layers, sizes and router norms, from headers and routers alone.

    Example: moeq inspect mistralai/Mixtral-8x7B-v0.1
    """
    with SourceModel(resolve_model(model)) as source:
        facts = inspect_facts(source, read_layout(source))
    if as_json:
        show.emit(facts)
    else:
        show.print_inspection(facts)


def inspect_facts(model: SourceModel, layout: Layout) -> dict[str, Any]:
    """Return the facts that ``moeq inspect`` shows.

    Raises:
        CheckpointError: a damaged or missing tensor.
    """
    layers = []
    for layer in layout.layers:
        norms = router_norm(model.shards.load(layer.router))
        layers.append({"prefix": layer.prefix, "experts": layer.num_experts, "router_norm": norms})
    expert_weights = sum(layer.weights_per_expert * layer.num_experts for layer in layout.layers)
    weights = sum(info.numel for info in model.shards.tensors.values())
    expert_bytes = sum(
        model.shards.stored_bytes(layer.weight(expert, projection))
        for layer in layout.layers
        for expert in range(layer.num_experts)
        for projection in layer.projections.names()
    )
    return {
        "model": str(model.folder),
        "model_type": layout.model_type,
        "parameters": weights,
        "expert_parameters": expert_weights,
        "bytes": model.stored_bytes,
        "expert_bytes": expert_bytes,
        "linears": len(layout.linears),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in model.shards.tensors.values()}),
        "expert_shapes": {name: list(shape) for name, shape in layout.layers[0].shapes.items()},
        "layers": layers,
    }

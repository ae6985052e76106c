"""Where each architecture keeps its routers and experts: one table row each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planner.checkpoint import SourceModel
from vllm_moeq.format import CheckpointError, Projections, TensorInfo, UsageError


@dataclass(frozen=True)
class Architecture:
    """One row: names relative to ``model.layers.N``.

    ``block`` names the MoE block in the checkpoint where transformers calls it ``mlp``.
    """

    router: str
    experts: str
    projections: Projections
    expert_count: tuple[str, ...]
    block: str = "mlp"

    def router_name(self, layer: int) -> str:
        """Checkpoint name of a layer's router weight."""
        return f"model.layers.{layer}.{self.router}"

    def prefix(self, layer: int) -> str:
        """Checkpoint prefix of a layer's experts."""
        return f"model.layers.{layer}.{self.experts}"

    def module_name(self, name: str) -> str:
        """Name in transformers of a module or parameter within a layer of the checkpoint."""
        return f"mlp.{name.removeprefix(self.block + '.')}" if name.startswith(f"{self.block}.") else name

    def checkpoint_name(self, layer: int, name: str) -> str:
        """Checkpoint name of a parameter that transformers calls ``name`` within a MoE layer."""
        inside = f"{self.block}.{name.removeprefix('mlp.')}" if name.startswith("mlp.") else name
        return f"model.layers.{layer}.{inside}"


# transformers 5 writes num_local_experts for either model.
_COUNT_KEYS = ("num_local_experts", "num_experts")
_W123 = Projections(gate="w1", up="w3", down="w2")
_GATE_UP_DOWN = Projections(gate="gate_proj", up="up_proj", down="down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture(
        "block_sparse_moe.gate.weight", "block_sparse_moe.experts", _W123, _COUNT_KEYS, block="block_sparse_moe"
    ),
    "qwen3_moe": Architecture("mlp.gate.weight", "mlp.experts", _GATE_UP_DOWN, _COUNT_KEYS),
}
"""``model_type`` of config.json → row."""

KEPT = ("lm_head.weight", "embed_tokens.weight")
"""Two-dimensional weights that are never quantized, besides the routers."""


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a checkpoint."""

    index: int
    prefix: str
    router: str
    num_experts: int
    projections: Projections
    shapes: dict[str, tuple[int, int]]

    def weight(self, expert: int, projection: str) -> str:
        """Checkpoint name of one expert's matrix."""
        return f"{self.prefix}.{expert}.{projection}.weight"

    @property
    def weights_per_expert(self) -> int:
        """Number of weights of one expert."""
        return sum(rows * columns for rows, columns in self.shapes.values())


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is made of: MoE layers, other linears, and the tensors that stay as they are."""

    model_type: str
    num_layers: int
    layers: tuple[MoeLayer, ...]
    linears: tuple[str, ...]
    kept: tuple[str, ...]
    routers: tuple[str, ...]

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)


def architecture_of(model: SourceModel) -> Architecture:
    """Return the table row of a model.

    Raises:
        UsageError: an unknown ``model_type``; names the tensors that look like experts.
    """
    model_type = model.config.get("model_type")
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is not None:
        return row
    looks = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in model.shards.tensors if "expert" in name.lower()})
    found = ", ".join(looks[:6]) or "none"
    raise UsageError(
        f"{model.folder / 'config.json'}: model_type {model_type!r} is not supported "
        f"(supported: {', '.join(sorted(ARCHITECTURES))}); tensors that look like experts: {found}"
    )


def read_layout(model: SourceModel) -> Layout:
    """Find the MoE layers and linears of a checkpoint from its headers alone.

    Raises:
        MoeqError: an unknown architecture, a checkpoint that is quantized already, a missing expert
            tensor, or shapes that do not fit together.
    """
    row = architecture_of(model)
    if "quantization_config" in model.config:
        method = model.config["quantization_config"]
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UsageError(f"{model.folder / 'config.json'}: the model is quantized already ({name})")
    num_layers = model.integer("num_hidden_layers")
    layers = [_read_layer(model, row, index) for index in range(num_layers) if _has_experts(model, row, index)]
    if not layers:
        raise CheckpointError(f"{model.folder}: expected routers such as {row.router_name(0)}, found none")
    routers = {layer.router for layer in layers}
    prefixes = tuple(f"{layer.prefix}." for layer in layers)
    rest = {name: info for name, info in model.shards.tensors.items() if not name.startswith(prefixes)}
    linears = [name for name, info in rest.items() if _is_linear(name, info) and name not in routers]
    kept = [name for name in rest if name not in set(linears)]
    return Layout(
        model_type=str(model.config["model_type"]),
        num_layers=num_layers,
        layers=tuple(layers),
        linears=tuple(sorted(linears)),
        kept=tuple(sorted(kept)),
        routers=tuple(layer.router for layer in layers),
    )


def _is_linear(name: str, info: TensorInfo) -> bool:
    return name.endswith(".weight") and len(info.shape) == 2 and not name.endswith(KEPT)


def _has_experts(model: SourceModel, row: Architecture, index: int) -> bool:
    """Tell a MoE layer, even one whose router is missing, from a dense one."""
    first = f"{row.prefix(index)}.0.{row.projections.gate}.weight"
    return row.router_name(index) in model.shards.tensors or first in model.shards.tensors


def _read_layer(model: SourceModel, row: Architecture, index: int) -> MoeLayer:
    """Check that every expert of one layer has its matrices, all of one shape."""
    router = row.router_name(index)
    num_experts = model.integer(*row.expert_count)
    info = model.shards.info(router)
    if len(info.shape) != 2 or info.shape[0] != num_experts:
        raise CheckpointError(
            f"{model.folder / info.shard}: tensor {router}: expected [{num_experts}, hidden], found {list(info.shape)}"
        )
    shapes: dict[str, tuple[int, int]] = {}
    layer = MoeLayer(index, row.prefix(index), router, num_experts, row.projections, shapes)
    for expert in range(num_experts):
        for projection in row.projections.names():
            name = layer.weight(expert, projection)
            found = model.shards.info(name)
            if len(found.shape) != 2 or not found.dtype.is_floating_point:
                raise CheckpointError(
                    f"{model.folder / found.shard}: tensor {name}: expected a 2-D float tensor, "
                    f"found {found.dtype} {list(found.shape)}"
                )
            shape = (found.shape[0], found.shape[1])
            if shapes.setdefault(projection, shape) != shape:
                raise CheckpointError(
                    f"{model.folder / found.shard}: tensor {name}: expected {list(shapes[projection])} "
                    f"as in expert 0, found {list(shape)}"
                )
    stray = f"{layer.prefix}.{num_experts}."
    if any(name.startswith(stray) for name in model.shards.tensors):
        raise CheckpointError(f"{model.folder}: {stray}* exists, but the config has {num_experts} experts")
    return layer

"""The parts of a checkpoint, read from its headers alone: MoE layers, other linears, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from planner.model.architectures import Architecture, Stack
from planner.model.codecs import METHODS, read_settings
from planner.model.recognize import architecture_for
from planner.model.source import SourceModel
from vllm_moeq.format import (
    CODES_PER_BLOCK,
    EXPERT_COUNT,
    QUANT_METHOD,
    CheckpointError,
    Projections,
    TensorInfo,
    UsageError,
)
from vllm_moeq.format.speculation import SPECULATIVE

ROWS_MULTIPLE = 32
"""A matrix whose number of output neurons is no multiple of this is a gate or the like; no low-bit kernel takes it."""


EMBEDDING = "embed_tokens.weight"

STATE = ".A_log"
"""Name suffix of the decay of a Mamba block's state: a matrix in Mamba 1, a vector in Mamba 2."""


@dataclass(frozen=True)
class Biases:
    """Where the biases of a layer's experts are, each of all experts in one tensor.

    Attributes:
        first: name of those of gate and up [experts, 2·intermediate], or of up.
        down: name of those of down [experts, hidden].
        interleaved: whether those of gate and up alternate.
    """

    first: str
    down: str
    interleaved: bool


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a checkpoint.

    Attributes:
        index: the layer's index within its stack.
        block: name of the layer.
        prefix: prefix of the experts' names.
        router: name of the router's weight.
        num_experts: number of experts.
        projections: names of an expert's matrices.
        shapes: projection → [outputs, inputs].
        biases: where the experts' biases are; None if they have none.
    """

    index: int
    block: str
    prefix: str
    router: str
    num_experts: int
    projections: Projections
    shapes: dict[str, tuple[int, int]]
    biases: Biases | None = None

    def weight(self, expert: int, projection: str) -> str:
        """Return the checkpoint name of one expert's matrix."""
        return f"{self.prefix}.{expert}.{projection}.weight"

    @property
    def weights_per_expert(self) -> int:
        """Number of weights in one expert."""
        return sum(rows * columns for rows, columns in self.shapes.values())


@dataclass(frozen=True)
class Layout:
    """The parts of a checkpoint. Linears and tensors are given by name.

    Attributes:
        model_type: ``model_type`` in config.json.
        blocks: names of all layers, in order.
        layers: layers with experts.
        linears: matrices that are quantized in vLLM's own format.
        kept: tensors that are copied unchanged.
        plain: the matrices among ``kept``; vLLM may have a linear layer for them, so the config must list them as
            unquantized.
        left_out: tensors of layers for speculative decoding; the output does not have them.
        odd: the matrices among ``plain`` that would be linears if a block of codes divided their input dimension.
        speculative: the tensors among ``kept`` of layers for speculative decoding, where those are not left out.
        dense: the matrices among ``plain`` that would be linears if they stood in no Mamba 1 block.
    """

    model_type: str
    blocks: tuple[str, ...]
    layers: tuple[MoeLayer, ...]
    linears: tuple[str, ...]
    kept: tuple[str, ...]
    plain: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    speculative: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of layers of all kinds."""
        return len(self.blocks)

    @property
    def routers(self) -> tuple[str, ...]:
        """Names of the routers' weights."""
        return tuple(layer.router for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """Number of experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    def block_of(self, name: str) -> str | None:
        """Return the name of a tensor's layer; None for a tensor outside all layers."""
        return next((block for block in _heads(name) if block in self._known), None)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.blocks)


def _heads(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end, part in enumerate(parts) if part.isdigit()]


def architecture_of(model: SourceModel) -> Architecture:
    """Return the table row of a model.

    Raises:
        UsageError: an unknown ``model_type``; the message names tensors that look like experts.
    """
    return architecture_for(model.config, model.folder, model.shards.tensors)


def read_layout(model: SourceModel) -> Layout:
    """Find the MoE layers and linears of a checkpoint from its headers alone.

    Raises:
        MoeqError: an unknown architecture, an already quantized checkpoint, a missing expert tensor, or shapes that do
            not fit together.
    """
    row = architecture_of(model)
    _refuse_quantized(model)
    places = [(stack, index) for stack in row.stacks for index in range(stack.length or model.integer(*stack.count))]
    layers = [_read_layer(model, row, *place) for place in places if _has_experts(model, row, *place)]
    if not layers:
        raise CheckpointError(f"{model.folder}: expected routers such as {row.router_name(0)}, found none")
    blocks = tuple(f"{stack.layers}.{index}" for stack, index in places)
    mixers = _mixers(model)
    linears, kept, left_out = _sort(model, row, frozenset(blocks), layers, mixers)
    return Layout(
        model_type=str(model.config["model_type"]),
        blocks=blocks,
        layers=tuple(layers),
        linears=tuple(sorted(linears)),
        kept=tuple(sorted(kept)),
        plain=tuple(sorted(name for name in kept if is_plain(name, model.shards.info(name)))),
        left_out=tuple(sorted(left_out)),
        odd=tuple(sorted(name for name in kept if _is_odd(name, model.shards.info(name), row, blocks, layers))),
        dense=tuple(
            sorted(name for name in kept if name.startswith(mixers) and _is_linear(name, model.shards.info(name), row))
        ),
    )


def _sort(
    model: SourceModel, row: Architecture, blocks: frozenset[str], layers: Sequence[MoeLayer], mixers: tuple[str, ...]
) -> tuple[list[str], list[str], list[str]]:
    """Sort all tensors but expert matrices; return the names of linears, of tensors to keep and to leave out."""
    routers = {layer.router for layer in layers}
    prefixes = tuple(f"{layer.prefix}." for layer in layers)
    linears, kept, left_out = [], [], []
    for name, info in model.shards.tensors.items():
        if name.startswith(prefixes) and _is_of_an_expert(model, name, prefixes, row):
            continue
        inside = any(head in blocks for head in _heads(name))
        if (row.owner(name) is not None and not inside) or name.startswith(SPECULATIVE):
            left_out.append(name)
        elif inside and name not in routers and not name.startswith(mixers) and _is_linear(name, info, row):
            linears.append(name)
        else:
            kept.append(name)
    return linears, kept, left_out


def _mixers(model: SourceModel) -> tuple[str, ...]:
    """Return the name prefixes of Mamba 1 blocks: vLLM's layer for them takes no quantized linears."""
    tensors = model.shards.tensors.items()
    return tuple(name.removesuffix(STATE[1:]) for name, it in tensors if name.endswith(STATE) and len(it.shape) == 2)


def _refuse_quantized(model: SourceModel) -> None:
    """Refuse a source whose weights are not decoded, all or some.

    Raises:
        UsageError: naming the method, and the tensor if it is one.
    """
    settings = read_settings(model.folder, model.config)
    if settings is None:
        return
    if settings.method == QUANT_METHOD:
        raise UsageError(
            f"{settings.path}: expected a model that is not quantized, found a checkpoint of moeq; "
            "moeq export writes its values in sixteen bits, moeq verify and moeq report show it"
        )
    if settings.method not in METHODS:
        raise UsageError(
            f"{settings.path}: the model is quantized already ({settings.method:.80}) in a way that is not read; "
            f"expected sixteen bits, or one of {', '.join(METHODS)}"
        )
    for name, info in model.shards.tensors.items():
        if info.dtype.itemsize == 1 and len(info.shape) > 1:
            raise UsageError(
                f"{model.folder}: the model is quantized already ({settings.method}), and tensor {name} is in a way "
                "that cannot be read; expected scales beside it, or a tensor per expert"
            )


def _is_of_an_expert(model: SourceModel, name: str, prefixes: tuple[str, ...], row: Architecture) -> bool:
    """Tell whether a tensor belongs to one expert, not to all of a layer together as gpt-oss's biases do.

    Raises:
        CheckpointError: an expert has a tensor besides its matrices.
    """
    rest = next(name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)).split(".")
    if not rest[0].isdigit():
        return False
    if rest[1:] not in [[projection, "weight"] for projection in row.projections.names()]:
        names = ", ".join(row.projections.names())
        raise CheckpointError(f"{model.folder}: tensor {name}: expected an expert with the matrices {names} alone")
    return True


def _is_linear(name: str, info: TensorInfo, row: Architecture) -> bool:
    return _is_matrix(name, info, row) and info.shape[1] % CODES_PER_BLOCK == 0


def _is_matrix(name: str, info: TensorInfo, row: Architecture) -> bool:
    """Tell whether a tensor is a matrix that may be quantized, if its inputs fit."""
    matrix = name.endswith(".weight") and len(info.shape) == 2 and info.dtype.is_floating_point
    return matrix and not name.endswith(row.kept) and info.shape[0] % ROWS_MULTIPLE == 0


def _is_odd(name: str, info: TensorInfo, row: Architecture, blocks: Sequence[str], layers: Sequence[MoeLayer]) -> bool:
    """Tell whether a matrix in a layer is no linear for the size of its input dimension alone."""
    inside = any(head in blocks for head in _heads(name)) and name not in {layer.router for layer in layers}
    return inside and _is_matrix(name, info, row) and info.shape[1] % CODES_PER_BLOCK != 0


def is_plain(name: str, info: TensorInfo) -> bool:
    """Tell whether a tensor is a matrix for which vLLM may have a linear layer."""
    return name.endswith(".weight") and len(info.shape) == 2 and not name.endswith(EMBEDDING)


def _has_experts(model: SourceModel, row: Architecture, stack: Stack, index: int) -> bool:
    """Tell whether a layer is an MoE layer. Experts without a router count too, so that the missing router is named."""
    block = f"{stack.layers}.{index}.{stack.inside}"
    first = f"{block}{row.experts}.0.{row.projections.gate}.weight"
    return f"{block}{row.router}" in model.shards.tensors or first in model.shards.tensors


def _read_layer(model: SourceModel, row: Architecture, stack: Stack, index: int) -> MoeLayer:
    """Check one layer's router, and that each of its experts has all matrices in the same shapes; return the layer."""
    block = f"{stack.layers}.{index}"
    router, prefix = f"{block}.{stack.inside}{row.router}", f"{block}.{stack.inside}{row.experts}"
    num_experts = row.num_experts or model.integer(*EXPERT_COUNT)
    info = model.shards.info(router)
    if len(info.shape) != 2 or info.shape[0] != num_experts or 0 in info.shape:
        raise CheckpointError(
            f"{model.folder / info.shard}: tensor {router}: expected [{num_experts}, hidden], found {list(info.shape)}"
        )
    shapes: dict[str, tuple[int, int]] = {}
    biases = _biases(model, row, prefix)
    layer = MoeLayer(index, block, prefix, router, num_experts, row.projections, shapes, biases)
    for expert in range(num_experts):
        for projection in row.projections.names():
            name = layer.weight(expert, projection)
            found = model.shards.info(name)
            if len(found.shape) != 2 or 0 in found.shape or not found.dtype.is_floating_point:
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
    if biases is not None:
        _check_biases(model, layer, biases)
    stray = f"{layer.prefix}.{num_experts}."
    if any(name.startswith(stray) for name in model.shards.tensors):
        raise CheckpointError(f"{model.folder}: {stray}* exists, but the config has {num_experts} experts")
    return layer


def _biases(model: SourceModel, row: Architecture, prefix: str) -> Biases | None:
    """Return where the biases of a layer's experts are; None if it has none."""
    first = "up_proj_bias" if row.projections.up is None else "gate_up_proj_bias"
    names = f"{prefix}.{first}", f"{prefix}.down_proj_bias"
    if not any(name in model.shards.tensors for name in names):
        return None
    return Biases(*names, interleaved=row.fused is not None and row.fused.interleaved)


def _check_biases(model: SourceModel, layer: MoeLayer, biases: Biases) -> None:
    """Refuse biases that do not fit the matrices.

    Raises:
        CheckpointError: one is missing, or has another shape; the message names it.
    """
    names = layer.projections
    stacked = sum(layer.shapes[name][0] for name in names.names() if name != names.down)
    for name, rows in ((biases.first, stacked), (biases.down, layer.shapes[names.down][0])):
        info = model.shards.info(name)
        if info.shape != (layer.num_experts, rows) or not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{model.folder / info.shard}: tensor {name}: expected a float tensor {[layer.num_experts, rows]}, "
                f"found {info.dtype} {list(info.shape)}"
            )

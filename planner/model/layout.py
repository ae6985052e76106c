"""The parts of a checkpoint, read from its headers alone: MoE layers, other linears, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from planner.model.architectures import Architecture, Stack
from planner.model.encodings import DECODED
from planner.model.recognize import architecture_for
from planner.model.source import SourceModel
from vllm_moeq.format import CODES_PER_BLOCK, EXPERT_COUNT, CheckpointError, Projections, TensorInfo, UsageError

ROWS_MULTIPLE = 32
"""A matrix whose number of output neurons is no multiple of this is a gate or the like; no low-bit kernel takes it."""


SPECULATIVE = ("mtp.", "model.mtp.")
"""Name prefixes of layers for speculative decoding that are no decoder layers."""

COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
"""The keys in which models say how many such layers they have; vLLM reads them all."""

EMBEDDING = "embed_tokens.weight"

STATE = ".A_log"
"""Name suffix of the decay of a Mamba block's state: a matrix in Mamba 1, a vector in Mamba 2."""


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
    """

    index: int
    block: str
    prefix: str
    router: str
    num_experts: int
    projections: Projections
    shapes: dict[str, tuple[int, int]]

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
        plain=tuple(sorted(name for name in kept if _is_plain(name, model.shards.info(name)))),
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
    found = model.config.get("quantization_config")
    if found is None:
        return
    name = found.get("quant_method") if isinstance(found, dict) else found
    if name not in DECODED:
        raise UsageError(f"{model.folder / 'config.json'}: the model is quantized already ({name})")
    undecoded = [
        name for name, info in model.shards.tensors.items() if info.dtype.itemsize == 1 and len(info.shape) > 1
    ]
    if undecoded:
        raise UsageError(
            f"{model.folder}: the model is quantized already ({name}), and tensor {undecoded[0]} is in a way that "
            "cannot be read; expected scales of blocks of 128 × 128 weights (fp8), or blocks of 32 (mxfp4)"
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


def _is_plain(name: str, info: TensorInfo) -> bool:
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
    layer = MoeLayer(index, block, prefix, router, num_experts, row.projections, shapes)
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
    stray = f"{layer.prefix}.{num_experts}."
    if any(name.startswith(stray) for name in model.shards.tensors):
        raise CheckpointError(f"{model.folder}: {stray}* exists, but the config has {num_experts} experts")
    return layer

"""One matrix per expert and projection, also where a checkpoint stores all experts of a layer in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from planner.model.architectures import Architecture, Fused
from planner.model.codecs import PLAIN, VALUES, Encoded, Weight
from planner.model.matrix import Matrix
from vllm_moeq.format import CheckpointError
from vllm_moeq.format.tensors import Tensors


@dataclass(frozen=True)
class StoredWeights:
    """The weights of some files, encoded or not.

    Attributes:
        files: the stored tensors.
        encoded: those that need decoding.
    """

    files: Tensors
    encoded: Encoded

    def get(self, name: str) -> Weight | None:
        """Return a weight, or None if there is none of this name."""
        if name in self.encoded.weights:
            return self.encoded.weights[name]
        info = self.files.tensors.get(name)
        return None if info is None or name in self.encoded.hidden else Weight(PLAIN, info.shape, {VALUES: name})


def expert_views(weights: StoredWeights, row: Architecture) -> dict[str, Matrix]:
    """Return the expert matrices that share a stored tensor or have another name in the source.

    Raises:
        CheckpointError: a tensor whose shape does not fit the architecture.
    """
    found: dict[str, Matrix] = {}
    for block in _blocks(weights.files, row):
        for fused in row.fusions():
            found |= _fused(weights, row, fused, block)
        if row.expert != "{}":
            found |= _renamed(weights, row, block)
    return found


def _blocks(files: Tensors, row: Architecture) -> list[str]:
    """Return the prefix of the MoE block's names for each layer that has tensors."""
    owners = {owner for name in files.tensors if (owner := row.owner(name)) is not None}
    return [f"{row.stacks[stack].layers}.{index}.{row.stacks[stack].inside}" for stack, index in sorted(owners)]


def _fused(weights: StoredWeights, row: Architecture, fused: Fused, block: str) -> dict[str, Matrix]:
    names = row.projections
    if names.up is None:
        return {}
    found: dict[str, Matrix] = {}
    exchanged = _exchanged(weights, f"{block}{fused.gate_up}", f"{block}{fused.down}", fused.transposed)
    for stored, projections in ((fused.gate_up, (names.gate, names.up)), (fused.down, (names.down,))):
        name = f"{block}{stored}"
        weight = weights.get(name)
        if weight is None:
            continue
        turned, shape = weight.codec.turned() if exchanged else None, weight.shape
        if len(shape) != 3 or shape[1 + (turned is not None)] % len(projections):
            raise CheckpointError(
                f"{weights.files.folder}: tensor {name}: expected [experts, {len(projections)} × outputs, inputs]"
                f"{'' if turned is None else ' with the last two exchanged'}, found {list(shape)}"
            )
        count, outputs, inputs = shape if turned is None else (shape[0], shape[2], shape[1])
        outputs //= len(projections)
        whole = Matrix(turned or weight.codec, weight.parts, outputs, inputs, members=count * len(projections))
        for number, projection in enumerate(projections):
            interleaved = fused.interleaved and len(projections) > 1
            first, step = (number, len(projections)) if interleaved else (number * outputs, 1)
            for expert in range(count):
                logical = f"{block}{row.experts}.{expert}.{projection}.weight"
                found[logical] = replace(whole, index=expert, first=first, step=step)
    return found


def _exchanged(weights: StoredWeights, gate_up: str, down: str, usual: bool) -> bool:
    """Tell by shapes whether two fused tensors have their last two dimensions exchanged.

    Qwen3-VL exists in both forms. The shapes of the two together are those of one form only.

    Args:
        weights: the stored weights.
        gate_up: name of the tensor of gate and up.
        down: name of the tensor of down.
        usual: the answer for tensors that fit neither form.
    """
    first, second = weights.get(gate_up), weights.get(down)
    if first is None or second is None or len(first.shape) != 3 or len(second.shape) != 3:
        return usual
    (_, rows, columns), (_, outputs, inputs) = first.shape, second.shape
    if (rows, columns) == (2 * inputs, outputs):
        return False
    return (rows, columns) == (inputs, 2 * outputs) or usual


def fuse(fused: Fused, experts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Join the matrices of a layer's experts into the stored tensor, the reverse of :func:`expert_views`.

    Args:
        fused: layout of the stored tensor.
        experts: matrices [outputs, inputs] of each expert: gate and up, or down alone.
    """
    if fused.interleaved:
        whole = torch.stack([torch.stack(list(parts), dim=1).flatten(0, 1) for parts in experts])
    else:
        whole = torch.stack([torch.cat(list(parts)) for parts in experts])
    return (whole.mT if fused.transposed else whole).contiguous()


def _renamed(weights: StoredWeights, row: Architecture, block: str) -> dict[str, Matrix]:
    """Return the expert matrices under names that have the expert's number alone."""
    found: dict[str, Matrix] = {}
    for projection in row.projections.names():
        expert, pattern = 0, f"{block}{row.experts}.{row.expert}.{projection}.weight"
        while (weight := weights.get(pattern.format(expert))) is not None:
            if len(weight.shape) == 2:
                name = f"{block}{row.experts}.{expert}.{projection}.weight"
                found[name] = Matrix(weight.codec, weight.parts, *weight.shape)
            expert += 1
    return found

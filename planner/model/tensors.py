"""A source's tensors as the planner uses them: one decoded tensor [outputs, inputs] per expert matrix.

Some checkpoints store all experts of a layer in one tensor, transpose it, interleave gate and up, or use eight or four
bits with a scale per block. :class:`SourceTensors` gives each matrix of such a tensor a name of its own and reads it on
demand. It does not change other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from planner.model.architectures import Architecture, Fused
from planner.model.encodings import PLAIN, Codec, codec_of
from planner.model.recognize import find_architecture
from planner.model.renamed import PublishedNames
from vllm_moeq.format import CheckpointError, ShardSet, TensorInfo
from vllm_moeq.format.tensors import Tensors


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] inside a stored tensor.

    Attributes:
        tensor: the stored tensor's name, without the codec's suffixes.
        codec: storage format of the values.
        rows: number of output neurons.
        columns: number of inputs.
        index: the expert's index in a tensor that holds all experts; None for a tensor of one matrix.
        first: stored row that holds the matrix's row 0.
        step: distance between stored rows of the matrix.
        transposed: whether the tensor's last two dimensions are exchanged.
    """

    tensor: str
    codec: Codec
    rows: int
    columns: int
    index: int | None = None
    first: int = 0
    step: int = 1
    transposed: bool = False

    def read(self, files: Tensors, begin: int, end: int) -> torch.Tensor:
        """Return the decoded rows from ``begin`` up to, but not including, ``end``."""
        first, last = self.first + begin * self.step, self.first + (end - 1) * self.step + 1
        parts = {suffix: files.map(name, self.index) for suffix, name in self.codec.tensors(self.tensor).items()}
        if self.transposed:
            parts = {suffix: part.mT for suffix, part in parts.items()}
        return self.codec.read(parts, first, last, self.step).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes in the file."""
        return round(self.rows * self.columns * self.codec.bits / 8)


class SourceTensors(Tensors):
    """The tensors of a folder under logical names.

    Args:
        folder: a Hugging Face folder.
        config: contents of its config.json.
        files: the folder's stored tensors, if they are already open.
        matrices: logical name → location in a stored tensor; None to find the matrices by the architecture.

    Raises:
        MoeqError: see :class:`ShardSet`; an expert tensor whose shape does not fit the architecture.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        files: Tensors | None = None,
        matrices: Mapping[str, Matrix] | None = None,
    ) -> None:
        self.folder = folder
        self.files: Tensors = files or ShardSet(folder)
        row = find_architecture(config)
        if row is not None and row.own_layout(self.files.tensors):
            self.files = PublishedNames(self.files, row)
        if matrices is None:
            matrices = _decoded(self.files) | ({} if row is None else _experts(self.files, row))
        self.matrices = matrices
        hidden = {name for matrix in self.matrices.values() for name in matrix.codec.tensors(matrix.tensor).values()}
        self.tensors = {name: info for name, info in self.files.tensors.items() if name not in hidden}
        for name, matrix in self.matrices.items():
            stored = self.files.info(next(iter(matrix.codec.tensors(matrix.tensor).values())))
            dtype = matrix.codec.dtype or stored.dtype
            self.tensors[name] = TensorInfo(stored.shard, (matrix.rows, matrix.columns), dtype, stored.offset)

    def load(self, name: str) -> torch.Tensor:
        """See :meth:`ShardSet.load`."""
        matrix = self.matrices.get(name)
        return self.files.load(name) if matrix is None else matrix.read(self.files, 0, matrix.rows)

    def map(self, name: str, index: int | None = None) -> torch.Tensor:
        """See :meth:`ShardSet.map`."""
        matrix = self.matrices.get(name)
        if matrix is None:
            return self.files.map(name, index)
        whole = matrix.read(self.files, 0, matrix.rows)
        return whole if index is None else whole[index]

    def read_rows(self, name: str, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`ShardSet.read_rows`."""
        matrix = self.matrices.get(name)
        if matrix is None:
            return self.files.read_rows(name, begin, end, buffer)
        return matrix.read(self.files, begin, end)

    def stored_bytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in the file."""
        matrix = self.matrices.get(name)
        return self.files.info(name).nbytes if matrix is None else matrix.nbytes

    def check_unchanged(self) -> None:
        """See :meth:`ShardSet.check_unchanged`."""
        self.files.check_unchanged()

    def close(self) -> None:
        """See :meth:`ShardSet.close`."""
        self.files.close()


def _decoded(files: Tensors) -> dict[str, Matrix]:
    """Return the two-dimensional weights that need decoding, under their own names."""
    found = {}
    for name in files.tensors:
        codec = codec_of(name, files.tensors)
        if codec is not PLAIN:
            shape = codec.shape(name, files)
            if len(shape) == 2:
                found[name] = Matrix(name, codec, *shape)
    return found


def _experts(files: Tensors, row: Architecture) -> dict[str, Matrix]:
    """Return the expert matrices that share a stored tensor or have another name in the source."""
    found: dict[str, Matrix] = {}
    for block in _blocks(files, row):
        for fused in row.fusions():
            found |= _fused(files, row, fused, block)
        if row.expert != "{}":
            found |= _renamed(files, row, block)
    return found


def _blocks(files: Tensors, row: Architecture) -> list[str]:
    """Return the prefix of the MoE block's names for each layer that has tensors."""
    owners = {owner for name in files.tensors if (owner := row.owner(name)) is not None}
    return [f"{row.stacks[stack].layers}.{index}.{row.stacks[stack].inside}" for stack, index in sorted(owners)]


def _fused(files: Tensors, row: Architecture, fused: Fused, block: str) -> dict[str, Matrix]:
    names = row.projections
    if names.up is None:
        return {}
    found: dict[str, Matrix] = {}
    exchanged = _exchanged(files, f"{block}{fused.gate_up}", f"{block}{fused.down}", fused.transposed)
    for stored, projections in ((fused.gate_up, (names.gate, names.up)), (fused.down, (names.down,))):
        name = f"{block}{stored}"
        codec = codec_of(name, files.tensors)
        if next(iter(codec.tensors(name).values())) not in files.tensors:
            continue
        shape = codec.shape(name, files)
        transposed = exchanged and codec is PLAIN
        if len(shape) != 3 or shape[1 + transposed] % len(projections):
            raise CheckpointError(
                f"{files.folder}: tensor {name}: expected [experts, {len(projections)} × outputs, inputs]"
                f"{' with the last two exchanged' if transposed else ''}, found {list(shape)}"
            )
        count, outputs, inputs = shape[0], shape[1 + transposed] // len(projections), shape[2 - transposed]
        whole = Matrix(name, codec, outputs, inputs, transposed=transposed)
        for number, projection in enumerate(projections):
            interleaved = fused.interleaved and len(projections) > 1
            first, step = (number, len(projections)) if interleaved else (number * outputs, 1)
            for expert in range(count):
                logical = f"{block}{row.experts}.{expert}.{projection}.weight"
                found[logical] = replace(whole, index=expert, first=first, step=step)
    return found


def _exchanged(files: Tensors, gate_up: str, down: str, usual: bool) -> bool:
    """Tell by shapes whether two fused tensors have their last two dimensions exchanged.

    Qwen3-VL exists in both forms. The shapes of the two together are those of one form only.

    Args:
        files: the stored tensors.
        gate_up: name of the tensor of gate and up.
        down: name of the tensor of down.
        usual: the answer for tensors that fit neither form, or that are encoded.
    """
    first, second = (files.tensors.get(name) for name in (gate_up, down))
    if first is None or second is None or len(first.shape) != 3 or len(second.shape) != 3:
        return usual
    (_, rows, columns), (_, outputs, inputs) = first.shape, second.shape
    if (rows, columns) == (2 * inputs, outputs):
        return False
    return (rows, columns) == (inputs, 2 * outputs) or usual


def fuse(fused: Fused, experts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Join the matrices of a layer's experts into the stored tensor. :class:`SourceTensors` does the reverse.

    Args:
        fused: layout of the stored tensor.
        experts: matrices [outputs, inputs] of each expert: gate and up, or down alone.
    """
    if fused.interleaved:
        whole = torch.stack([torch.stack(list(parts), dim=1).flatten(0, 1) for parts in experts])
    else:
        whole = torch.stack([torch.cat(list(parts)) for parts in experts])
    return (whole.mT if fused.transposed else whole).contiguous()


def _renamed(files: Tensors, row: Architecture, block: str) -> dict[str, Matrix]:
    """Return the expert matrices under names that have the expert's number alone."""
    found: dict[str, Matrix] = {}
    for projection in row.projections.names():
        expert = 0
        while (name := f"{block}{row.experts}.{row.expert.format(expert)}.{projection}.weight") in files.tensors:
            shape = files.info(name).shape
            if len(shape) == 2:
                found[f"{block}{row.experts}.{expert}.{projection}.weight"] = Matrix(name, PLAIN, *shape)
            expert += 1
    return found

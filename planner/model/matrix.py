"""One matrix inside the stored tensors of a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from planner.model.codecs import Codec, UnreadableError
from vllm_moeq.format import CheckpointError
from vllm_moeq.format.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [rows, columns] inside stored tensors.

    Attributes:
        codec: storage format of the values.
        parts: role → name of a stored tensor; the values come first.
        rows: number of output neurons.
        columns: number of inputs.
        index: the expert's index in tensors that hold all experts; None for tensors of one matrix.
        first: stored row that holds the matrix's row 0.
        step: distance between stored rows of the matrix.
        members: number of matrices in the stored tensors.
    """

    codec: Codec
    parts: Mapping[str, str]
    rows: int
    columns: int
    index: int | None = None
    first: int = 0
    step: int = 1
    members: int = 1

    def read(self, files: Tensors, begin: int, end: int) -> torch.Tensor:
        """Return the decoded rows from ``begin`` up to, but not including, ``end``.

        Raises:
            CheckpointError: a tensor cannot be read, or holds values that cannot be decoded.
        """
        first, last = self.first + begin * self.step, self.first + (end - 1) * self.step + 1
        shared = self.codec.shared
        parts = {role: files.map(name, None if role in shared else self.index) for role, name in self.parts.items()}
        try:
            values = self.codec.read(parts, first, last, self.step)
        except UnreadableError as error:
            raise CheckpointError(f"{files.place(self.parts[error.role])}: {error}") from None
        return (values if self.codec.dtype is None else values.to(self.codec.dtype)).contiguous()

    def nbytes(self, files: Tensors) -> int:
        """Return the bytes that the matrix takes in the files, with its share of what others use too."""
        return sum(files.info(name).nbytes for name in self.parts.values()) // self.members

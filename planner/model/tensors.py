"""A source's tensors as the planner uses them: one decoded tensor [outputs, inputs] per expert matrix.

Some checkpoints store all experts of a layer in one tensor, transpose it, interleave gate and up, or encode weights in
fewer bits (``codecs``). :class:`SourceTensors` gives each matrix a name of its own and reads it on demand. It does not
change other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from planner.model.codecs import Encoded, can_read, find_encoded, read_settings
from planner.model.expert_views import StoredWeights, expert_views
from planner.model.matrix import Matrix
from planner.model.recognize import find_architecture
from planner.model.renamed import PublishedNames
from vllm_moeq.format import ShardSet
from vllm_moeq.format.headers import DTYPES
from vllm_moeq.format.tensors import Tensors

ENCODED_DTYPES = {**DTYPES, "F8_E8M0": torch.float8_e8m0fnu}
"""Dtypes in the headers of encoded sources. Powers of two are scales, which no other file has."""


class SourceTensors(Tensors):
    """The tensors of a folder under logical names.

    Args:
        folder: a Hugging Face folder.
        config: contents of its config.json.
        files: the folder's stored tensors, if they are already open.
        matrices: logical name → location in stored tensors; None to find the matrices by the architecture.
        decode: whether encoded weights are decoded.

    Raises:
        MoeqError: see :class:`ShardSet`; an expert tensor whose shape does not fit the architecture; an encoded weight
            whose tensors do not fit together.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        files: Tensors | None = None,
        matrices: Mapping[str, Matrix] | None = None,
        decode: bool = True,
    ) -> None:
        self.folder = folder
        settings = read_settings(folder, config) if decode and matrices is None else None
        encoded_source = settings is not None and can_read(settings)
        self.files: Tensors = files or ShardSet(folder, ENCODED_DTYPES if encoded_source else DTYPES)
        row = find_architecture(config)
        if row is not None and row.own_layout(self.files.tensors):
            self.files = PublishedNames(self.files, row)
        encoded = find_encoded(self.files, settings)
        if matrices is None:
            views = {} if row is None else expert_views(StoredWeights(self.files, encoded), row)
            matrices = _decoded(encoded) | views
        self.matrices = matrices
        hidden = {name for matrix in self.matrices.values() for name in matrix.parts.values()} | encoded.hidden
        hidden -= _unread(encoded, self.matrices)
        self.tensors = {name: info for name, info in self.files.tensors.items() if name not in hidden}
        for name, matrix in self.matrices.items():
            stored = self.files.info(next(iter(matrix.parts.values())))
            dtype = matrix.codec.dtype or stored.dtype
            self.tensors[name] = replace(stored, shape=(matrix.rows, matrix.columns), dtype=dtype)

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
        return self.files.info(name).nbytes if matrix is None else matrix.nbytes(self.files)

    def check_unchanged(self) -> None:
        """See :meth:`ShardSet.check_unchanged`."""
        self.files.check_unchanged()

    def close(self) -> None:
        """See :meth:`ShardSet.close`."""
        self.files.close()


def _decoded(encoded: Encoded) -> dict[str, Matrix]:
    """Return the two-dimensional weights that need decoding, under their own names."""
    return {
        name: Matrix(weight.codec, weight.parts, *weight.shape)
        for name, weight in encoded.weights.items()
        if len(weight.shape) == 2
    }


def _unread(encoded: Encoded, matrices: Mapping[str, Matrix]) -> set[str]:
    """Return the stored tensors of encoded weights that no matrix reads: those of stacks of no known layer."""
    read = {name for matrix in matrices.values() for name in matrix.parts.values()}
    return {name for weight in encoded.weights.values() for name in weight.parts.values() if name not in read}

"""The interface of a set of named tensors, read from files as they are, or renamed or converted."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.headers import TensorInfo


class Tensors(Protocol):
    """Named tensors: headers in memory, values on demand; for example a :class:`~vllm_moeq.format.ShardSet`.

    Attributes:
        folder: the folder that holds the files.
        tensors: the headers by name.
    """

    folder: Path
    tensors: dict[str, TensorInfo]

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's header entry; raise CheckpointError if there is no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]

    def place(self, name: str) -> str:
        """Return the file and the name of a tensor, as messages name it."""
        return f"{self.folder / self.info(name).shard}: tensor {name}"

    def stored_bytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in its file."""
        return self.info(name).nbytes

    def load(self, name: str) -> torch.Tensor:
        """See :meth:`ShardSet.load`."""
        ...

    def map(self, name: str, index: int | None = None) -> torch.Tensor:
        """See :meth:`ShardSet.map`."""
        ...

    def read_rows(self, name: str, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`ShardSet.read_rows`."""
        ...

    def check_unchanged(self) -> None:
        """See :meth:`ShardSet.check_unchanged`."""
        return

    def close(self) -> None:
        """See :meth:`ShardSet.close`."""
        return

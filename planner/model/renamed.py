"""Checkpoints in transformers 5's own layout, under the names of the published models.

``save_pretrained(save_original_format=False)`` keeps the names that modules have inside transformers, and all experts
of a layer in one tensor. Everything else in the planner knows published names alone.
"""

from __future__ import annotations

import torch

from planner.model.architectures import Architecture
from vllm_moeq.format import CheckpointError
from vllm_moeq.format.tensors import Tensors


class PublishedNames(Tensors):
    """The tensors of some files, those that have transformers' names under the names of a published model.

    Args:
        files: the stored tensors.
        row: the model's architecture.

    Raises:
        CheckpointError: a tensor is there under both names.
    """

    def __init__(self, files: Tensors, row: Architecture) -> None:
        self.folder = files.folder
        self.files = files
        self._stored: dict[str, str] = {}
        for stored in files.tensors:
            name = row.published_name(stored)
            other = self._stored.setdefault(name, stored)
            if other != stored:
                raise CheckpointError(
                    f"{files.place(stored)}: expected one of it and {other}, which are the same tensor"
                )
        self.tensors = {name: files.tensors[stored] for name, stored in self._stored.items()}

    def load(self, name: str) -> torch.Tensor:
        """See :meth:`ShardSet.load`."""
        return self.files.load(self._stored.get(name, name))

    def map(self, name: str, index: int | None = None) -> torch.Tensor:
        """See :meth:`ShardSet.map`."""
        return self.files.map(self._stored.get(name, name), index)

    def read_rows(self, name: str, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`ShardSet.read_rows`."""
        return self.files.read_rows(self._stored.get(name, name), begin, end, buffer)

    def check_unchanged(self) -> None:
        """See :meth:`ShardSet.check_unchanged`."""
        self.files.check_unchanged()

    def close(self) -> None:
        """See :meth:`ShardSet.close`."""
        self.files.close()

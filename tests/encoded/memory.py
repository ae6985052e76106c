"""Stored tensors that lie in memory, for tests of what reads files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_moeq.format import TensorInfo
from vllm_moeq.format.tensors import Tensors


class Memory(Tensors):
    """Tensors by name, as if one shard held them."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        self.folder = Path("folder")
        self.stored = dict(stored)
        self.tensors = {
            name: TensorInfo("model.safetensors", tuple(tensor.shape), tensor.dtype, 0)
            for name, tensor in stored.items()
        }

    def load(self, name: str) -> torch.Tensor:
        return self.stored[name]

    def map(self, name: str, index: int | None = None) -> torch.Tensor:
        return self.stored[name] if index is None else self.stored[name][index]

    def read_rows(self, name: str, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        return self.stored[name][begin:end]

"""What every backend takes and gives: one layer's packed experts, and a callable that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_moeq.kernels.ragged import RaggedMatrices


@dataclass(frozen=True)
class PackedMatrices:
    """E matrices in the checkpoint's packing.

    Attributes:
        matrices: widths, shapes and offsets.
        words: int32 [matrices.num_words].
        scales: float16 or float32 [E, rows, groups].
        zeros: same shape and dtype; w = (q − zero)·scale.
    """

    matrices: RaggedMatrices
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True)
class PackedExperts:
    """A layer on this rank.

    Attributes:
        gate_up: [E, 2·intermediate, hidden], gate's rows first.
        down: [E, hidden, intermediate].
    """

    gate_up: PackedMatrices
    down: PackedMatrices

    @property
    def bits(self) -> tuple[int, ...]:
        """Width of each local expert."""
        return self.gate_up.matrices.bits

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return self.gate_up.matrices.columns

    @property
    def intermediate(self) -> int:
        """Intermediate size on this rank."""
        return self.down.matrices.columns


class LayerKernel(Protocol):
    """One layer, repacked for a backend."""

    name: str

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden]: each token's weighted sum over its local experts.

        Safe under CUDA graph capture once :meth:`warm_up` has run.

        Args:
            x: [tokens, hidden], float16 or bfloat16; on a CPU also float32.
            topk_weights: [tokens, top-k] float32 routing weights.
            topk_ids: [tokens, top-k] local expert indices, negative to skip.
        """
        ...

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Compile every variant that calls with this activation dtype and top-k can need."""
        ...

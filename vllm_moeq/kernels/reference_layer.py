"""The reference arithmetic as a backend."""

from __future__ import annotations

import torch

from vllm_moeq.kernels.interface import PackedExperts
from vllm_moeq.kernels.operator import moe
from vllm_moeq.kernels.reference import moe_reference


class ReferenceLayer:
    """The reference as a backend; it computes from the loaded buffers.

    It waits for the device in every call, so CUDA graphs cannot capture it.

    Args:
        packed: the layer as loaded, in any schemes; it is kept.
    """

    name = "reference"

    def __init__(self, packed: PackedExperts) -> None:
        self.packed = packed

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden]; see :func:`moe_reference`."""
        if torch.compiler.is_compiling():  # it would look inside, and stop where the routing decides what runs
            return moe(x, topk_weights, topk_ids, self.packed)
        return moe_reference(x, topk_weights, topk_ids, self.packed)

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Do nothing: there is nothing to compile."""

"""The reference arithmetic as a backend."""

from __future__ import annotations

import torch

from vllm_moeq.format import WHOLE_ROW
from vllm_moeq.kernels.interface import PackedExperts
from vllm_moeq.kernels.operator import moe
from vllm_moeq.kernels.reference import moe_reference


class ReferenceLayer:
    """The reference as a backend; it computes from the loaded buffers.

    It waits for the device in every call, so CUDA graphs cannot capture it.

    Args:
        packed: the layer as loaded, with all experts stored by the grid; it is kept.
    """

    name = "reference"

    def __init__(self, packed: PackedExperts) -> None:
        self.packed = packed
        self._gate_up, self._down = ((it.words, it.scales, it.zeros) for it in (packed.gate_up, packed.down))
        self._bits = list(packed.bits)
        first, second = packed.gate_up.matrices.group_size, packed.down.matrices.group_size
        # They differ only if every row is one group, as long as the row.
        self._group_size = first if first == second else WHOLE_ROW

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden]; see :func:`moe_reference`."""
        first, second = self.packed.gate_up.matrices, self.packed.down.matrices
        if torch.compiler.is_compiling():  # it would look inside, and stop where the routing decides what runs
            groups = self._group_size, second.group_offset
            return moe(x, topk_weights, topk_ids, self._gate_up, self._down, self._bits, *groups)
        return moe_reference(x, topk_weights, topk_ids, first, self._gate_up, second, self._down)

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Do nothing: there is nothing to compile."""

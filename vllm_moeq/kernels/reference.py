"""The mixed-width MoE layer in plain torch: the numerics that every other backend is compared with."""

from __future__ import annotations

import torch

from vllm_moeq.kernels.interface import PackedExperts, PackedMatrices
from vllm_moeq.kernels.ragged import RaggedMatrices


def dense_expert(
    matrices: RaggedMatrices,
    expert: int,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantize one expert of the grid; see :meth:`PackedMatrices.dense`.

    Args:
        matrices: the layout of the buffers.
        expert: local index.
        words: int32 buffer of all experts.
        scales: [E, rows, groups].
        zeros: [E, rows, groups].
        dtype: of the result [rows, columns].
    """
    return PackedMatrices(matrices, words, scales, zeros).dense(expert, dtype)


def moe_reference(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: RaggedMatrices,
    w13_tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    w2: RaggedMatrices,
    w2_tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Sum over each token's local experts of weight · down(silu(gate(x)) · up(x)).

    Rounded to x's dtype where a fused kernel rounds, the weights and the hidden activations; sums are
    float32.

    Args:
        x: [tokens, hidden], any float dtype.
        topk_weights: [tokens, top-k] routing weights.
        topk_ids: [tokens, top-k] local expert indices; negative ones are skipped.
        w13: layout of gate and up, gate's rows first.
        w13_tensors: words, scales, zeros of gate and up.
        w2: layout of down.
        w2_tensors: words, scales, zeros of down.

    Returns:
        [tokens, hidden] in x's dtype; zeros for tokens without a local expert.
    """
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(topk_ids).tolist():
        if expert < 0:
            continue
        token, slot = torch.nonzero(topk_ids == expert, as_tuple=True)
        first = dense_expert(w13, expert, *w13_tensors, x.dtype).float()
        gate, up = (x[token].float() @ first.T).chunk(2, dim=-1)
        hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype).float()
        second = dense_expert(w2, expert, *w2_tensors, x.dtype).float()
        result.index_add_(0, token, (hidden @ second.T) * topk_weights[token, slot, None].float())
    return result.to(x.dtype)


class ReferenceLayer:
    """The reference as a backend; waits for the device in every call, so not for CUDA graphs."""

    name = "reference"

    def __init__(self, packed: PackedExperts) -> None:
        self.packed = packed

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden]; see :func:`moe_reference`."""
        gate_up, down = self.packed.gate_up, self.packed.down
        return moe_reference(
            x, topk_weights, topk_ids, gate_up.matrices, _tensors(gate_up), down.matrices, _tensors(down)
        )

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Nothing to compile."""


def _tensors(packed: PackedMatrices) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return packed.words, packed.scales, packed.zeros

"""The MoE layer in plain torch: every other backend is compared with its numbers."""

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
        expert: the expert's local index.
        words: the codes of all experts, 1-D int32.
        scales: the scales of all experts [E, rows, groups].
        zeros: the zeros of all experts [E, rows, groups].
        dtype: the dtype of the result [rows, columns].
    """
    return PackedMatrices(matrices, words, scales, zeros).dense(expert, dtype)


def moe_reference(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, packed: PackedExperts
) -> torch.Tensor:
    """Return the sum of weight · down(activation(gate_up(x))) over each token's local experts, with biases.

    Like a fused kernel, it rounds the weights and the activation's results to x's dtype. Sums are float32. What a
    rotation changes is rounded to x's dtype too.

    Args:
        x: hidden states [tokens, hidden], any float dtype.
        topk_weights: routing weights [tokens, top-k].
        topk_ids: local expert indices [tokens, top-k]; negative ones are skipped.
        packed: the layer.

    Returns:
        [tokens, hidden] in x's dtype; zeros for tokens without a local expert.
    """
    gate_up, down = packed.gate_up, packed.down
    inputs = gate_up.inputs(x)
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(topk_ids).tolist():
        if expert < 0:
            continue
        token, slot = torch.nonzero(topk_ids == expert, as_tuple=True)
        first = gate_up.biased(expert, inputs[token].float() @ gate_up.dense(expert, x.dtype).float().T)
        hidden = down.inputs(packed.activation(first).to(x.dtype)).float()
        second = down.biased(expert, hidden @ down.dense(expert, x.dtype).float().T)
        result.index_add_(0, token, second * topk_weights[token, slot, None].float())
    return result.to(x.dtype)

"""The MoE layer in plain torch: every other backend is compared with its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_moeq.format import BlockRotation
from vllm_moeq.kernels.interface import PackedMatrices
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
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: RaggedMatrices,
    w13_tensors: Sequence[torch.Tensor],
    w2: RaggedMatrices,
    w2_tensors: Sequence[torch.Tensor],
    rotations: tuple[BlockRotation | None, BlockRotation | None] = (None, None),
) -> torch.Tensor:
    """Return the sum of weight · down(silu(gate(x)) · up(x)) over each token's local experts.

    Like a fused kernel, it rounds the weights and the activations after silu(gate)·up to x's dtype. Sums are float32.

    Args:
        x: hidden states [tokens, hidden], any float dtype.
        topk_weights: routing weights [tokens, top-k].
        topk_ids: local expert indices [tokens, top-k]; negative ones are skipped.
        w13: the layout of gate and up, gate's rows first.
        w13_tensors: gate's and up's buffers in the order of ``w13.suffixes``; the grid's are words, scales and zeros.
        w2: the layout of down.
        w2_tensors: down's buffers in the order of ``w2.suffixes``.
        rotations: the rotations of x and of down's inputs in whose basis the experts are stored. What is rotated is
            rounded to x's dtype.

    Returns:
        [tokens, hidden] in x's dtype; zeros for tokens without a local expert.
    """
    gate_up = PackedMatrices(w13, *w13_tensors, rotation=rotations[0])
    down = PackedMatrices(w2, *w2_tensors, rotation=rotations[1])
    inputs = gate_up.inputs(x)
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(topk_ids).tolist():
        if expert < 0:
            continue
        token, slot = torch.nonzero(topk_ids == expert, as_tuple=True)
        first = gate_up.dense(expert, x.dtype).float()
        gate, up = (inputs[token].float() @ first.T).chunk(2, dim=-1)
        hidden = down.inputs((torch.nn.functional.silu(gate) * up).to(x.dtype)).float()
        second = down.dense(expert, x.dtype).float()
        result.index_add_(0, token, (hidden @ second.T) * topk_weights[token, slot, None].float())
    return result.to(x.dtype)

"""The interface of every backend: it takes a layer's packed experts and returns a callable that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_moeq.format import PACKED, SCALE, ZERO, BlockRotation
from vllm_moeq.kernels.activations import SILU, Activation
from vllm_moeq.kernels.ragged import RaggedMatrices


class PackedMatrices:
    """E matrices as a checkpoint stores them.

    Args:
        matrices: the layout: widths, shapes and schemes.
        tensors: the buffers in the order of ``matrices.suffixes``; the grid's are words, scales and zeros.
        rotation: the rotation of the inputs in whose basis all matrices are stored; None if they are not rotated.
        bias: what is added to the outputs, [E, rows], any float dtype; None for nothing.

    Attributes:
        matrices: the layout.
        tensors: the buffers by suffix.
        rotation: the rotation of the inputs.
        bias: the biases, float32 [E, rows], or None.
    """

    def __init__(
        self,
        matrices: RaggedMatrices,
        *tensors: torch.Tensor,
        rotation: BlockRotation | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.matrices = matrices
        self.tensors = dict(zip(matrices.suffixes, tensors, strict=True))
        self.rotation = rotation
        self.bias = None if bias is None else bias.float()

    @property
    def device(self) -> torch.device:
        """The buffers' device."""
        return next(iter(self.tensors.values())).device

    @property
    def words(self) -> torch.Tensor:
        """The grid's codes, int32 [matrices.num_words]."""
        return self.tensors[PACKED]

    @property
    def scales(self) -> torch.Tensor:
        """The grid's scales, float16 or float32 [E, rows, groups]."""
        return self.tensors[SCALE]

    @property
    def zeros(self) -> torch.Tensor:
        """The grid's zeros, with the shape and dtype of the scales; w = (q − zero)·scale."""
        return self.tensors[ZERO]

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] in the basis of the stored matrices, in its dtype."""
        return x if self.rotation is None else self.rotation(x)

    def biased(self, expert: int, outputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs [..., rows] of one expert with its bias."""
        return outputs if self.bias is None else outputs + self.bias[expert].to(outputs.dtype)

    def dense(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the stored weights of one expert, computed in float32 and rounded once; see :meth:`inputs`.

        Args:
            expert: the expert's local index.
            dtype: the dtype of the result.

        Returns:
            The weights [rows, columns].
        """
        layout = self.matrices
        scheme = layout.schemes[expert]
        tensors = {suffix: layout.view(self.tensors[suffix], suffix, expert) for suffix in scheme.suffixes}
        return scheme.dequantize(tensors, layout.bits[expert], layout.group_size, layout.group_offset).to(dtype)


@dataclass(frozen=True)
class PackedExperts:
    """The experts of a layer on this rank.

    Attributes:
        gate_up: the matrices [E, 2·intermediate, hidden], gate's rows first; without a gate up's alone.
        down: the matrices [E, hidden, intermediate].
        activation: what happens between the two.
    """

    gate_up: PackedMatrices
    down: PackedMatrices
    activation: Activation = SILU

    @property
    def bits(self) -> tuple[int, ...]:
        """Width of each local expert."""
        return self.gate_up.matrices.bits

    @property
    def device(self) -> torch.device:
        """The buffers' device."""
        return self.gate_up.device

    @property
    def schemes(self) -> tuple[str, ...]:
        """The names of the experts' schemes, each once."""
        return tuple(dict.fromkeys(scheme.name for scheme in self.gate_up.matrices.schemes))

    @property
    def rotated(self) -> bool:
        """Whether the experts are stored in a rotated basis."""
        return self.gate_up.rotation is not None or self.down.rotation is not None

    @property
    def biased(self) -> bool:
        """Whether a projection has biases."""
        return self.gate_up.bias is not None or self.down.bias is not None

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return self.gate_up.matrices.columns

    @property
    def intermediate(self) -> int:
        """Intermediate size on this rank."""
        return self.down.matrices.columns


class LayerKernel(Protocol):
    """A layer, repacked for a backend."""

    name: str

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return each token's weighted sum over its local experts, [tokens, hidden].

        CUDA graphs can capture a call once :meth:`warm_up` has run.

        Args:
            x: hidden states [tokens, hidden], float16 or bfloat16; on a CPU also float32.
            topk_weights: routing weights [tokens, top-k], float32.
            topk_ids: local expert indices [tokens, top-k]; negative ones are skipped.
        """
        ...

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Compile every variant that a call with this activation dtype and top-k may use."""
        ...

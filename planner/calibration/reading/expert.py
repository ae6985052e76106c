"""The weights of one expert and its forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from planner.model.layout import MoeLayer
from planner.model.source import SourceModel
from vllm_moeq.format.schemes import check_finite
from vllm_moeq.kernels import Activation

EXPERT_COPIES = 3
"""Number of float32 copies of an expert while it is loaded: codes, values, and the matrix in the layers' dtype."""


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one expert, which computes down(activation(gate(x), up(x))), or down(activation(up(x))).

    Attributes:
        first: the matrices before the activation, each [intermediate, hidden]: gate and up, or up alone.
        down: down projection [hidden, intermediate].
        first_bias: biases of ``first``, one behind the other; None for none.
        down_bias: biases of ``down`` [hidden]; None for none.
    """

    first: tuple[torch.Tensor, ...]
    down: torch.Tensor
    first_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """Return all matrices, down last."""
        return (*self.first, self.down)

    def replaced(self, matrices: Iterable[torch.Tensor]) -> ExpertWeights:
        """Return an expert with other matrices, in the order of :meth:`matrices`, and the same biases."""
        *first, down = matrices
        return ExpertWeights(tuple(first), down, self.first_bias, self.down_bias)

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the expert with weights of a dtype."""
        biases = (None if bias is None else bias.to(dtype) for bias in (self.first_bias, self.down_bias))
        return ExpertWeights(tuple(matrix.to(dtype) for matrix in self.first), self.down.to(dtype), *biases)

    def stacked(self) -> torch.Tensor:
        """Return the matrices before the activation as one."""
        return torch.cat(self.first)

    def split(self, stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the parts of a tensor that has the rows of :meth:`stacked`."""
        parts: tuple[torch.Tensor, ...] = stacked.split([len(matrix) for matrix in self.first])
        return parts

    def inner(self, inputs: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Return the input of the down projection [n, intermediate]."""
        outputs = torch.cat([inputs @ matrix.mT for matrix in self.first], dim=-1)
        return activation(outputs if self.first_bias is None else outputs + self.first_bias.to(outputs))

    def outputs(self, inner: torch.Tensor) -> torch.Tensor:
        """Return the expert's outputs [n, hidden] for inputs of its down projection."""
        outputs = inner @ self.down.mT
        return outputs if self.down_bias is None else outputs + self.down_bias.to(outputs)

    def __call__(self, inputs: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Return the expert's outputs [n, hidden]."""
        return self.outputs(self.inner(inputs, activation))


def load_expert(
    model: SourceModel, layer: MoeLayer, expert: int, device: torch.device, dtype: torch.dtype | None = None
) -> ExpertWeights:
    """Read an expert's matrices and biases.

    Raises:
        CheckpointError: a matrix is not finite.
    """
    names = [layer.weight(expert, projection) for projection in layer.projections.names()]
    *first, down = matrices = [model.shards.map(name).to(device, dtype) for name in names]
    for name, matrix in zip(names, matrices, strict=True):
        if not bool(torch.isfinite(matrix.sum())):  # a NaN or an infinity stays one in the sum
            check_finite(matrix, model.shards.place(name))
    if layer.biases is None:
        return ExpertWeights(tuple(first), down)
    before, behind = (
        model.shards.map(name, expert).to(device, dtype) for name in (layer.biases.first, layer.biases.down)
    )
    if layer.biases.interleaved:
        before = before.view(-1, 2).mT.flatten()
    return ExpertWeights(tuple(first), down, before, behind)

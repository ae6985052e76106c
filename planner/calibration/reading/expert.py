"""The weights of one expert and its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from planner.model.layout import MoeLayer
from planner.model.source import SourceModel

Activation = Callable[[torch.Tensor], torch.Tensor]


EXPERT_COPIES = 3
"""Number of float32 copies of an expert while it is loaded: codes, values, and the matrix in the layers' dtype."""


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one expert, which computes down(activation(gate(x)) · up(x)).

    Attributes:
        gate: gate projection [intermediate, hidden].
        up: up projection, same shape.
        down: down projection [hidden, intermediate].
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return gate, up and down."""
        return self.gate, self.up, self.down

    def inner(self, inputs: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Return the input of the down projection [n, intermediate]."""
        return activation(inputs @ self.gate.mT) * (inputs @ self.up.mT)


def load_expert(
    model: SourceModel, layer: MoeLayer, expert: int, device: torch.device, dtype: torch.dtype | None = None
) -> ExpertWeights:
    """Read an expert's three matrices."""
    names = (layer.weight(expert, projection) for projection in layer.projections.names())
    return ExpertWeights(*(model.shards.map(name).to(device, dtype) for name in names))

"""The rotations of a layer's activations, as the native kernel takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockRotation:
    """One rotation: signs, then a Hadamard matrix over √size for each block of columns.

    Attributes:
        signs: int32 [columns/32]; bit j of word i is 1 where the sign of column 32·i + j is negative.
        size: columns of a block, a power of two from 16 to 256 that divides the columns.
    """

    signs: torch.Tensor
    size: int

    def factors(self) -> torch.Tensor:
        """Return each column's sign over √size, float32 [columns]."""
        negative = self.signs[:, None] >> torch.arange(32, dtype=torch.int32) & 1
        return (1 - 2 * negative).flatten().float().mul(self.size**-0.5)


@dataclass(frozen=True)
class Rotations:
    """What is rotated before a product with the experts.

    Attributes:
        before_up: the rotation of the layer's input; None leaves it as it is.
        before_down: the rotation of silu(gate)·up.
    """

    before_up: BlockRotation | None = None
    before_down: BlockRotation | None = None

    def sizes(self) -> tuple[int, int]:
        """Return both sizes, 0 for none."""
        return (self.before_up.size if self.before_up else 0, self.before_down.size if self.before_down else 0)

    def factors(self) -> torch.Tensor:
        """Return the factors of both, one after the other."""
        parts = [each.factors() for each in (self.before_up, self.before_down) if each]
        return torch.cat([torch.empty(0), *parts])

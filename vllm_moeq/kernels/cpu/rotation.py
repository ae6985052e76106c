"""The rotations of a layer's activations, as the native kernel takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_moeq.format import BlockRotation, unpack_signs


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
        parts = [unpack_signs(each.signs).mul(each.size**-0.5) for each in (self.before_up, self.before_down) if each]
        return torch.cat([torch.empty(0, dtype=torch.float32), *parts])

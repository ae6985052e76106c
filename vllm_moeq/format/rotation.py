"""The rotation of a layer's activations: signs, then a Hadamard matrix for each block of them (docs/format.md).

Q·x = blockdiag(H/√n)·(s ∘ x) is orthogonal, so W·x = (W·Qᵀ)·(Q·x). Rotated weights are nearly normal, which is what the
trellis rounds best. A layer has one rotation of its input and one of what its down projections take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from vllm_moeq.format.packing import CODES_PER_BLOCK

SIGNS = "weight_signs"
"""The suffix of a layer's signs. They stand beside its first expert's matrices: the gate's for gate and up, and the
down projection's, because every loader of experts finds them there."""
ROTATION_SIZES = (16, 32, 64, 128, 256)


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """Return signs as a file holds them: bit j of word i is 1 where the sign of element 32·i + j is negative.

    Args:
        signs: 1 or −1, any dtype [K], K a multiple of 32.

    Returns:
        int32 [K / 32].
    """
    places = torch.arange(CODES_PER_BLOCK, device=signs.device)
    return ((signs < 0).view(-1, CODES_PER_BLOCK).long() << places).sum(dim=1).to(torch.int32)


def unpack_signs(words: torch.Tensor) -> torch.Tensor:
    """Return the signs, 1 or −1, float32 [K], from the words of a file, int32 [K / 32]."""
    places = torch.arange(CODES_PER_BLOCK, dtype=torch.int32, device=words.device)
    return 1.0 - 2.0 * (words[:, None] >> places & 1).flatten().float()


@cache
def _hadamard(size: int) -> torch.Tensor:
    """Return the Hadamard matrix in Sylvester's order over √size, float32 [size, size]; not to be changed."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return (matrix / math.sqrt(size)).float()


def rotate(x: torch.Tensor, signs: torch.Tensor, size: int) -> torch.Tensor:
    """Return Q·x for each vector of the last dimension.

    Args:
        x: any float dtype [..., K].
        signs: 1 or −1, float32 [K].
        size: elements per block, one of :data:`ROTATION_SIZES` that divides K.

    Returns:
        float32 [..., K].
    """
    blocks = torch.unflatten(x.float() * signs, -1, (-1, size))
    return torch.flatten(blocks @ _hadamard(size).to(x.device), -2)


def unrotate(x: torch.Tensor, signs: torch.Tensor, size: int) -> torch.Tensor:
    """Return Qᵀ·x, the inverse of :func:`rotate`."""
    blocks = torch.unflatten(x.float(), -1, (-1, size))
    return torch.flatten(blocks @ _hadamard(size).to(x.device), -2) * signs


@dataclass(frozen=True)
class Rotated:
    """The rotation of a stored matrix's inputs.

    Attributes:
        name: the name in the checkpoint of its layer's signs, int32 [K / 32].
        size: elements per block.
    """

    name: str
    size: int

    def undo(self, weights: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Return stored weights in the basis of the model, float32 [N, K].

        Args:
            weights: as stored, any float dtype [N, K].
            words: the signs as stored.
        """
        return unrotate(weights, unpack_signs(words).to(weights.device), self.size)


@dataclass(frozen=True)
class BlockRotation:
    """A rotation with its signs: what a kernel does to a layer's input, or to what its down projections take.

    Attributes:
        signs: the signs as stored, int32 [K / 32]; on a rank, its part of them.
        size: elements per block.
    """

    signs: torch.Tensor
    size: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return Q·x for each vector of the last dimension, computed in float32 and rounded once to x's dtype."""
        return rotate(x, unpack_signs(self.signs.to(x.device)), self.size).to(x.dtype)


def rotation_size(columns: int, most: int = 128) -> int | None:
    """Return the largest size up to ``most`` that divides the columns, or None."""
    return max((size for size in ROTATION_SIZES if size <= most and columns % size == 0), default=None)

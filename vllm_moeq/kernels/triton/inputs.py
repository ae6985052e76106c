"""What a projection reads: activations in the orders of columns that its codings need, and their sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from vllm_moeq.format import BlockRotation
from vllm_moeq.kernels.triton.around import column_sums
from vllm_moeq.kernels.triton.arrange import arrange
from vllm_moeq.kernels.triton.codings import rings_in
from vllm_moeq.kernels.triton.repack import Repacked


@dataclass(frozen=True)
class Inputs:
    """The inputs of one projection.

    Attributes:
        x: the activations [copies, rows, columns], maybe with zeros behind the columns of the matrices.
        sums: the sums of each row over equal parts of the padded columns, float32 [rows, …].
    """

    x: torch.Tensor
    sums: torch.Tensor

    @property
    def rows(self) -> int:
        """The number of rows, tokens or pairs."""
        return self.x.shape[1]

    @property
    def columns(self) -> int:
        """The distance of two rows."""
        return self.x.shape[2]


@dataclass(frozen=True)
class Preparation:
    """What happens to activations before a projection.

    Attributes:
        matrices: the projection.
        signs: the signs of its rotation, on the matrices' device; None if it is not rotated.
        size: elements per block of the rotation, or 0.
    """

    matrices: Repacked
    signs: torch.Tensor | None
    size: int

    @property
    def changes(self) -> bool:
        """Whether the projection reads anything but the activations as they are."""
        return self.size > 0 or True in rings_in(self.matrices.codings)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> Inputs:
        """Return the inputs in one launch.

        Args:
            x: activations [rows, columns].
            ids: local expert indices [rows]; the inputs of rows with negative ones hold no values. None keeps all.
        """
        matrices = self.matrices
        if not self.changes:
            return Inputs(x[None], sums_of(x, matrices))
        rings = rings_in(matrices.codings)
        padded = matrices.blocks * matrices.block
        out = x.new_empty((len(rings), x.shape[0], padded))
        sums = sums_for(x, matrices)
        arrange[(x.shape[0], matrices.blocks)](
            x, ids, self.signs, out, sums, x.shape[1], padded, matrices.lanes, self.size, False in rings, True in rings,
            matrices.group_size, num_warps=2,
        )  # fmt: skip
        return Inputs(out, sums)


def prepare(matrices: Repacked, rotation: BlockRotation | None) -> Preparation:
    """Return the preparation for a projection whose matrices are stored in the basis of a rotation, or of the model."""
    if rotation is None:
        return Preparation(matrices, None, 0)
    return Preparation(matrices, rotation.signs.to(matrices.words.device), rotation.size)


def sums_for(x: torch.Tensor, matrices: Repacked) -> torch.Tensor:
    """Return an empty tensor for the sums of x over each group of the matrices' padded columns."""
    columns = matrices.blocks * (matrices.block // matrices.group_size)
    return torch.empty((x.shape[0], columns), dtype=torch.float32, device=x.device)


def sums_of(x: torch.Tensor, matrices: Repacked) -> torch.Tensor:
    """Return Σ x over each group of the matrices' padded input dimension, float32 [rows, groups]."""
    sums = sums_for(x, matrices)
    columns = sums.shape[1]
    chunks = min(16, triton.next_power_of_2(columns))
    column_sums[(x.shape[0], triton.cdiv(columns, chunks))](
        x, sums, x.shape[1], columns, SUM=matrices.group_size, CHUNKS=chunks
    )
    return sums

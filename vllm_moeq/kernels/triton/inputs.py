"""What a projection reads: activations in the orders of columns that its codings need, and their sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from vllm_moeq.format import BlockRotation
from vllm_moeq.kernels.triton.around import column_sums
from vllm_moeq.kernels.triton.arrange import arrange
from vllm_moeq.kernels.triton.codings import rings_in
from vllm_moeq.kernels.triton.records import NO_ARGUMENTS, NO_CONSTANTS, Lookup
from vllm_moeq.kernels.triton.repack import Repacked

CHUNK = 32
"""Columns per sum where sums are not per group: the neurons of one tile of gate and up, the inputs of two fields."""


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

    def __call__(
        self, x: torch.Tensor, few: bool, local: torch.Tensor | None = None, lookup: Lookup | None = None
    ) -> Inputs:
        """Return the inputs in one launch.

        Args:
            x: activations [rows, columns].
            few: whether ``few_tokens`` reads them, not ``many_tokens``.
            local: local expert indices [rows]; the inputs of rows with negative ones hold no values. None keeps all.
            lookup: the records to make in the same launch; None for none. The rows are then tokens.
        """
        matrices, size = self.matrices, sum_size(self.matrices, few)
        sums = x.new_empty((x.shape[0], matrices.blocks * (matrices.block // size)), dtype=torch.float32)
        more = NO_ARGUMENTS if lookup is None else lookup.arguments
        constants = NO_CONSTANTS if lookup is None else lookup.constants
        if not self.changes:
            columns = sums.shape[1]
            chunks = min(16, triton.next_power_of_2(columns))
            column_sums[(x.shape[0], triton.cdiv(columns, chunks) + constants["TOP_K"])](
                x, sums, x.shape[1], columns, size, chunks, *more, **constants
            )
            return Inputs(x[None], sums)
        rings = rings_in(matrices.codings)
        padded = matrices.blocks * matrices.block
        out = x.new_empty((len(rings), x.shape[0], padded))
        arrange[(x.shape[0], matrices.blocks + constants["TOP_K"])](
            x, local, self.signs, out, sums, x.shape[1], padded, *more, LANES=matrices.lanes, SIZE=self.size,
            PLAIN=False in rings, RINGS=True in rings, SUM=size, **constants, num_warps=2,
        )  # fmt: skip
        return Inputs(out, sums)


def prepare(matrices: Repacked, rotation: BlockRotation | None) -> Preparation:
    """Return the preparation for a projection whose matrices are stored in the basis of a rotation, or of the model."""
    if rotation is None:
        return Preparation(matrices, None, 0)
    return Preparation(matrices, rotation.signs.to(matrices.words.device), rotation.size)


def sum_size(matrices: Repacked, few: bool) -> int:
    """Return over how many columns a projection needs sums: those of a group, or where codes are spread, of a chunk."""
    spread = few and False in rings_in(matrices.codings)
    return CHUNK if spread else matrices.group_size

"""How a layer's experts of different widths lie in memory: one ragged buffer of packed words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from vllm_moeq.format import packed_words


@dataclass(frozen=True)
class RaggedMatrices:
    """Offsets of E matrices [rows, columns] of different widths in one 1-D int32 buffer.

    Attributes:
        bits: width of each local expert.
        rows: output neurons.
        columns: input dimension on this rank, a multiple of 32.
        group_size: weights per scale along the input dimension (``columns`` or more: one group).
        group_offset: position of column 0 within its group; not 0 where tensor parallelism splits the
            input dimension inside a group.
    """

    bits: tuple[int, ...]
    rows: int
    columns: int
    group_size: int
    group_offset: int = 0

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First word of each expert, then the length of the buffer."""
        sizes = (self.rows * packed_words(self.columns, bits) for bits in self.bits)
        return tuple(accumulate(sizes, initial=0))

    @property
    def num_words(self) -> int:
        """Length of the buffer in 32-bit words."""
        return self.offsets[-1]

    @property
    def groups(self) -> int:
        """Scales per row on this rank."""
        return -(-(self.group_offset + self.columns) // self.group_size)


def ragged(bits: Sequence[int], rows: int, columns: int, group_size: int, group_offset: int = 0) -> RaggedMatrices:
    """Build :class:`RaggedMatrices`; a group size of −1 is one group per row."""
    size = group_offset + columns if group_size < 0 else group_size
    return RaggedMatrices(tuple(bits), rows, columns, size, group_offset)

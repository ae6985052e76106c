"""The memory layout of a layer's experts of different widths: one ragged buffer of codes, and regular buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from vllm_moeq.format import GRID, Scheme, TensorLayout


@dataclass(frozen=True)
class RaggedMatrices:
    """The layout of E matrices [rows, columns] of different widths in a few buffers, one per suffix.

    A scheme's codes lie in one 1-D buffer, one expert after the other without gaps. Every other tensor has the same
    size for all widths and lies in a buffer [experts that have it, …].

    Attributes:
        bits: the width of each local expert.
        rows: output neurons.
        columns: the input dimension on this rank, a multiple of 32.
        group_size: weights per scale along the input dimension; with ``columns`` or more there is one group.
        group_offset: the position of column 0 within its group. It is not 0 if tensor parallelism splits the input
            dimension inside a group.
        schemes: the scheme of each local expert.
    """

    bits: tuple[int, ...]
    rows: int
    columns: int
    group_size: int
    group_offset: int
    schemes: tuple[Scheme, ...]

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of all tensors, each once; a rank without experts has the grid's."""
        return tuple(dict.fromkeys(suffix for scheme in self.schemes or (GRID,) for suffix in scheme.suffixes))

    def _layout(self, scheme: Scheme, bits: int) -> dict[str, TensorLayout]:
        return scheme.layout(self.rows, self.columns, bits, self.group_size, self.group_offset)

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, ...]]:
        """Every expert's first element and then the buffer's length, for each scheme's codes."""
        experts = list(zip(self.schemes, self.bits, strict=True))
        sizes = {(scheme, bits): self._layout(scheme, bits)[scheme.codes].numel for scheme, bits in set(experts)}
        found = {}
        for codes in {scheme.codes for scheme in self.schemes or (GRID,)}:
            own = (sizes[scheme, bits] if scheme.codes == codes else 0 for scheme, bits in experts)
            found[codes] = tuple(accumulate(own, initial=0))
        return found

    @property
    def offsets(self) -> tuple[int, ...]:
        """Every expert's first word in the grid's buffer of codes, then the buffer's length."""
        return self._offsets[GRID.codes]

    @property
    def num_words(self) -> int:
        """The length of the grid's buffer of codes in 32-bit words."""
        return self.offsets[-1]

    @property
    def groups(self) -> int:
        """The grid's scales per row on this rank."""
        return -(-(self.group_offset + self.columns) // self.group_size)

    def _members(self, suffix: str) -> list[int]:
        return [expert for expert, scheme in enumerate(self.schemes) if suffix in scheme.suffixes]

    def empty(self, suffix: str) -> torch.Tensor:
        """Allocate the buffer of one suffix, on torch's default device, with the first dtype that a file may use."""
        scheme, bits = next(
            ((own, bits) for own, bits in zip(self.schemes, self.bits, strict=True) if suffix in own.suffixes),
            (GRID, GRID.widths[0]),
        )
        tensor = self._layout(scheme, bits)[suffix]
        if suffix in self._offsets:
            return torch.empty(self._offsets[suffix][-1], dtype=tensor.dtypes[0])
        return torch.empty((len(self._members(suffix)), *tensor.shape), dtype=tensor.dtypes[0])

    def view(self, buffer: torch.Tensor, suffix: str, expert: int) -> torch.Tensor:
        """Return the view of one expert's tensor.

        Args:
            buffer: the buffer of all experts, as :meth:`empty` makes it.
            suffix: a suffix that the expert's scheme has.
            expert: the expert's local index.
        """
        if suffix not in self._offsets:
            return buffer[self._members(suffix).index(expert)]
        begin, end = self._offsets[suffix][expert : expert + 2]
        return buffer[begin:end].view(self._layout(self.schemes[expert], self.bits[expert])[suffix].shape)


def ragged(
    bits: Sequence[int],
    rows: int,
    columns: int,
    group_size: int,
    group_offset: int = 0,
    schemes: Sequence[Scheme] | None = None,
) -> RaggedMatrices:
    """Build :class:`RaggedMatrices`; the group size −1 means one group per row, and the default scheme is the grid."""
    size = group_offset + columns if group_size < 0 else group_size
    return RaggedMatrices(
        tuple(bits), rows, columns, size, group_offset, tuple(schemes) if schemes else (GRID,) * len(bits)
    )


def wide_enough(buffer: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the buffer, or a float32 copy if it is float16 and cannot hold the values exactly.

    Args:
        buffer: the buffer that the values go into.
        values: the values; bfloat16 has a larger range than float16.
    """
    narrow = buffer.dtype == torch.float16 and values.dtype != torch.float16
    return buffer.float() if narrow and not torch.equal(values.half().to(values.dtype), values) else buffer


def of_one_dtype(buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the buffers with all floating ones cast to the widest dtype among them, as the kernels require."""
    dtype = torch.float16
    for buffer in buffers.values():
        dtype = torch.promote_types(dtype, buffer.dtype) if buffer.is_floating_point() else dtype
    return {suffix: buffer.to(dtype) if buffer.is_floating_point() else buffer for suffix, buffer in buffers.items()}

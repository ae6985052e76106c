"""The affine grid: w = (q − zero) · scale, with one scale and one float zero per group of inputs (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.packing import CODES_PER_BLOCK, WHOLE_ROW, dequantize, packed_words, unpack
from vllm_moeq.format.schemes.base import Scheme, Span, TensorLayout
from vllm_moeq.format.tensors import Tensors

PACKED, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero"
SCALE_DTYPES = (torch.float16, torch.bfloat16)


class AffineGrid(Scheme):
    """The scheme with a bitstream of codes along the inputs, scales, and zeros."""

    name = "grid"
    suffixes = (PACKED, SCALE, ZERO)
    checked = (SCALE, ZERO)
    column_step = CODES_PER_BLOCK

    def layout(
        self, rows: int, columns: int, bits: int, group_size: int, group_offset: int = 0
    ) -> dict[str, TensorLayout]:
        """See :meth:`Scheme.layout`: int32 words [rows, columns·bits/32], scales and zeros [rows, groups]."""
        groups = 1 if group_size == WHOLE_ROW else -(-(group_offset + columns) // group_size)
        scales = TensorLayout(SCALE_DTYPES, (rows, groups))
        words = TensorLayout((torch.int32,), (rows, packed_words(columns, bits)))
        return {PACKED: words, SCALE: scales, ZERO: scales}

    def read_shape(self, shards: Tensors, base: str, bits: int, group_size: int) -> tuple[int, int]:
        """See :meth:`Scheme.read_shape`; the three tensors have to fit each other and the width."""
        packed, scale, zero = (shards.info(f"{base}.{suffix}") for suffix in self.suffixes)

        def expect(suffix: str, what: str, found: object) -> NoReturn:
            raise CheckpointError(f"{shards.place(f'{base}.{suffix}')}: expected {what}, found {found}")

        if packed.dtype != torch.int32 or len(packed.shape) != 2:
            expect(PACKED, "a 2-D int32 tensor", f"{packed.dtype} {list(packed.shape)}")
        if scale.dtype not in SCALE_DTYPES or len(scale.shape) != 2 or 0 in scale.shape:
            expect(SCALE, "a 2-D float16 or bfloat16 tensor", f"{scale.dtype} {list(scale.shape)}")
        if zero.dtype != scale.dtype or zero.shape != scale.shape:
            expect(ZERO, f"{scale.dtype} {list(scale.shape)}", f"{zero.dtype} {list(zero.shape)}")
        rows, groups = scale.shape
        columns = packed.shape[1] * 32 // bits
        if group_size == WHOLE_ROW:
            if groups != 1:
                expect(SCALE, f"[{rows}, 1] (one group per row)", list(scale.shape))
        else:
            columns = groups * group_size
        if columns % CODES_PER_BLOCK or packed.shape != (rows, packed_words(columns, bits)):
            expect(PACKED, f"[{rows}, {columns * bits // 32}] for {bits} bits", list(packed.shape))
        return rows, columns

    def check_values(self, values: torch.Tensor, suffix: str, place: str) -> None:
        """See :meth:`Scheme.check_values`; a scale of 0 is refused too."""
        super().check_values(values, suffix, place)
        if suffix == SCALE and bool((values == 0).any()):
            raise CheckpointError(f"{place}: expected no scale of 0")

    def cut(
        self, suffix: str, bits: int, group_size: int, *, rows: Span | None = None, columns: Span | None = None
    ) -> tuple[slice, ...]:
        """See :meth:`Scheme.cut`; two ranks that share a group both get its scale and zero."""
        height = slice(None) if rows is None else slice(*rows)
        if columns is None or (suffix != PACKED and group_size == WHOLE_ROW):
            return height, slice(None)
        begin, end = columns
        if suffix == PACKED:
            return height, slice(begin * bits // 32, end * bits // 32)
        return height, slice(begin // group_size, -(-end // group_size))

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, group_offset: int = 0
    ) -> torch.Tensor:
        """See :meth:`Scheme.dequantize`."""
        words, scales, zeros = (tensors[suffix] for suffix in self.suffixes)
        columns = words.shape[1] * 32 // bits
        codes = unpack(words, bits, columns)
        if scales.shape[1] == 1 or (group_offset == 0 and columns % group_size == 0):
            return dequantize(codes, scales, zeros)
        group = (torch.arange(columns, device=words.device) + group_offset) // group_size
        return (codes.float() - zeros.float()[:, group]) * scales.float()[:, group]


GRID = AffineGrid()

check_values = GRID.check_values
"""The check of the grid's scales and zeros, for callers outside this folder."""

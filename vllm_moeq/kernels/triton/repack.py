"""Repack weights from the checkpoint's packing into the kernel's order.

The input dimension is cut into blocks of 16·LANES inputs; the last block is padded with zeros. Input k of a block
belongs to field k // LANES and lane k % LANES. ``b`` planes of 16-bit words hold the 16 fields of every lane (see
:mod:`vllm_moeq.kernels.triton.fields`). The planes of 64 rows lie together and their blocks follow each other, so a
program reads one contiguous stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import gcd

import torch

from vllm_moeq.format import unpack
from vllm_moeq.kernels.interface import PackedMatrices

TILE = 64
FIELDS = 16


@dataclass(frozen=True)
class Repacked:
    """E matrices [rows, columns] in the kernel's order.

    Attributes:
        words: the codes of all experts, 1-D int16.
        scales: pairs of scale and zero [E, tiles, groups, 64]: int32 holds two float16, int64 two float32.
        widths: the experts' widths, int32 [E].
        offsets: each expert's first word in units of 64·lanes words, int32 [E].
        rows: output neurons, without padding.
        columns: inputs, without padding.
        lanes: words per plane and row, 16 or 32.
        groups: scales per block of the input dimension; 0 means one per row.
    """

    words: torch.Tensor
    scales: torch.Tensor
    widths: torch.Tensor
    offsets: torch.Tensor
    rows: int
    columns: int
    lanes: int
    groups: int

    @property
    def block(self) -> int:
        """Inputs per block."""
        return FIELDS * self.lanes

    @property
    def blocks(self) -> int:
        """Blocks of the input dimension."""
        return -(-self.columns // self.block)

    @property
    def group_size(self) -> int:
        """Inputs per scale; a whole block if there is one scale per row."""
        return self.block // max(self.groups, 1)


def repack(packed: PackedMatrices, *, gated: bool, lanes: int = 16) -> Repacked:
    """Repack one projection of a layer, one expert at a time.

    Args:
        packed: the projection as loaded.
        gated: whether the rows are gate's, then up's; they are reordered to eight of each in turn.
        lanes: 16, or 32 if the input dimension is a multiple of 512.
    """
    matrices = packed.matrices
    block = FIELDS * lanes
    blocks = -(-matrices.columns // block)
    tiles = -(-matrices.rows // TILE)
    device = packed.words.device
    order = row_order(matrices.rows, gated=gated).to(device)
    size = kernel_group(matrices.group_size, matrices.group_offset, matrices.columns, block)
    groups = 0 if matrices.groups == 1 else block // size
    unit = TILE * lanes
    offsets = list(accumulate((tiles * blocks * bits for bits in matrices.bits), initial=0))
    words = torch.empty(offsets[-1] * unit, dtype=torch.int16, device=device)
    shape = (len(matrices.bits), tiles, max(blocks * groups, 1), TILE)
    both = torch.zeros((*shape, 2), dtype=packed.scales.dtype, device=device)
    for expert, bits in enumerate(matrices.bits):
        begin, end = matrices.offsets[expert], matrices.offsets[expert + 1]
        codes = unpack(packed.words[begin:end].view(matrices.rows, -1), bits, matrices.columns)
        padded = codes.new_zeros(tiles * TILE, blocks * block)
        padded[: matrices.rows, : matrices.columns] = codes[order]
        words[offsets[expert] * unit : offsets[expert + 1] * unit] = planes(padded, bits, lanes).flatten()
        for index, source in enumerate((packed.scales, packed.zeros)):
            values = spread(source[expert][order], matrices.group_size, matrices.group_offset, matrices.columns, size)
            full = values.new_zeros(tiles * TILE, shape[2])
            full[: matrices.rows, : values.shape[1]] = values
            both[expert, ..., index] = full.view(tiles, TILE, -1).transpose(1, 2)
    return Repacked(
        words, both.view(torch.int32 if both.dtype == torch.float16 else torch.int64).squeeze(-1),
        torch.tensor(matrices.bits, dtype=torch.int32, device=device),
        torch.tensor(offsets[:-1], dtype=torch.int32, device=device),
        matrices.rows, matrices.columns, lanes, groups,
    )  # fmt: skip


def row_order(rows: int, *, gated: bool) -> torch.Tensor:
    """Return the source row of each row: if ``gated``, eight of gate, eight of up, and so on."""
    index = torch.arange(rows)
    return index.view(2, -1, 8).transpose(0, 1).flatten() if gated else index


def kernel_group(group_size: int, offset: int, columns: int, block: int) -> int:
    """Return the largest group size that divides the block, the checkpoint's group size and the offset within it."""
    if offset + columns <= group_size:
        return columns  # one group: the whole row
    return gcd(group_size, offset, block)


def spread(values: torch.Tensor, group_size: int, offset: int, columns: int, size: int) -> torch.Tensor:
    """Return the scales [rows, groups] repeated for groups of ``size`` inputs."""
    first = torch.arange(0, columns, size, device=values.device)
    return values[:, (first + offset) // group_size]


def planes(codes: torch.Tensor, bits: int, lanes: int) -> torch.Tensor:
    """Pack uint8 codes [tiles·64, blocks·16·lanes] into int16 [tiles, blocks, bits, 64, lanes]."""
    fields = codes.view(-1, TILE, codes.shape[1] // (FIELDS * lanes), FIELDS, lanes).permute(0, 2, 3, 1, 4)
    words = fields.new_zeros((*fields.shape[:2], bits, *fields.shape[3:]), dtype=torch.int32)
    per_word = 5 if bits == 3 else FIELDS // bits
    for plane in range(bits):
        for place in range(per_word):
            words[:, :, plane] |= fields[:, :, plane * per_word + place].int() << (place * bits)
        if bits == 3:
            words[:, :, plane] |= ((fields[:, :, 15].int() >> plane) & 1) << 15
    return words.to(torch.int16)  # the low 16 bits

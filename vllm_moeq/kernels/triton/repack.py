"""Repack weights from the checkpoint's packing into the kernel's order.

The input dimension is cut into blocks of 16·LANES inputs; the last block is padded with zeros. ``b`` planes of 16-bit
words hold a block of one row, a word of each plane per lane. Input k of a block belongs to field k // LANES and lane
k % LANES (see :mod:`vllm_moeq.kernels.triton.fields`); of a trellis, to field k % 16 and lane k // 16, so that a lane
has one row of one tile, as it is stored (see :mod:`vllm_moeq.kernels.triton.rings`). The planes of 64 rows lie together
and their blocks follow each other, so a program reads one contiguous stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from math import gcd

import torch

from vllm_moeq.format import CENTRE, GRID, PACKED, ROW_SCALE, SCALE, TRELLIS, TRELLIS_SCHEME, ZERO, Scheme, unpack
from vllm_moeq.kernels.interface import PackedMatrices
from vllm_moeq.kernels.ragged import RaggedMatrices
from vllm_moeq.kernels.triton.codings import CODINGS, number_of, set_of
from vllm_moeq.kernels.triton.fields import stored_at
from vllm_moeq.kernels.triton.rings import OFFSET

TILE = 64
FIELDS = 16


@dataclass(frozen=True)
class Repacked:
    """E matrices [rows, columns] in the kernel's order.

    Attributes:
        words: the codes of all experts, 1-D int16.
        scales: pairs of scale and zero, 1-D: int32 holds two float16, int64 two float32. An expert has [tiles, scales
            per row, 8, 8]: of a tile's rows first 0, 8, …, 56, then 1, 9, …, 57.
        table: for each expert the number of its coding, its first word in units of 64·lanes words, and its first scale
            in units of 64; int32 [E, 3].
        codings: the set of the experts' codings; bit i stands for number i.
        rows: output neurons, without padding.
        columns: inputs, without padding.
        lanes: words per plane and row, 16 or 32.
        groups: scales per block of the input dimension; 0 means one per row, which trellises always have.
        bias: biases in the kernel's order of rows, float32 [E, rows], or None.
    """

    words: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    codings: int
    rows: int
    columns: int
    lanes: int
    groups: int
    bias: torch.Tensor | None = None

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


@dataclass(frozen=True)
class Form:
    """How the kernel's order cuts one projection.

    Attributes:
        order: the source row of each row.
        tiles: tiles of 64 rows.
        blocks: blocks of the input dimension.
        lanes: words per plane and row.
        groups: scales of the grid per block; 0 means one per row.
    """

    order: torch.Tensor
    tiles: int
    blocks: int
    lanes: int
    groups: int

    @property
    def block(self) -> int:
        """Inputs per block."""
        return FIELDS * self.lanes

    @property
    def scales(self) -> int:
        """Scales of the grid per row."""
        return self.blocks * self.groups or 1

    def pad(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        """Return [rows, …] in the kernel's order of rows, with zeros up to [tiles·64, columns]."""
        padded = values.new_zeros(self.tiles * TILE, columns)
        padded[: len(self.order), : values.shape[1]] = values[self.order]
        return padded


def repack(packed: PackedMatrices, *, gated: bool, lanes: int = 16) -> Repacked:
    """Repack one projection of a layer, one expert at a time.

    Args:
        packed: the projection as loaded.
        gated: whether the rows are gate's, then up's; they are reordered to eight of each in turn.
        lanes: 16, or 32 if the input dimension is a multiple of 512.
    """
    matrices, device = packed.matrices, packed.device
    form = form_of(matrices, gated, lanes, device)
    dtype = reduce(torch.promote_types, (it.dtype for it in packed.tensors.values() if it.is_floating_point()))
    units = [form.tiles * form.blocks * bits for bits in matrices.bits]
    numbers = [number_of(*coding) for coding in zip(matrices.schemes, matrices.bits, strict=True)]
    counts = [form.tiles * (1 if CODINGS[number].ring else form.scales) for number in numbers]
    first_unit, first_scale = (list(accumulate(sizes, initial=0)) for sizes in (units, counts))
    words = torch.empty((first_unit[-1], TILE * lanes), dtype=torch.int16, device=device)
    pairs = torch.empty((first_scale[-1], 8, TILE // 8, 2), dtype=dtype, device=device)
    for expert, scheme in enumerate(matrices.schemes):
        planes, scales = REPACKERS[scheme](packed, expert, form)
        words[first_unit[expert] : first_unit[expert + 1]] = planes.reshape(-1, TILE * lanes)
        pairs[first_scale[expert] : first_scale[expert + 1]] = scales.reshape(-1, TILE // 8, 8, 2).transpose(1, 2)
    table = torch.tensor([numbers, first_unit[:-1], first_scale[:-1]], dtype=torch.int32, device=device)
    return Repacked(
        words.flatten(), pairs.view(torch.int32 if dtype == torch.float16 else torch.int64).flatten(),
        table.T.contiguous(), set_of(numbers), matrices.rows, matrices.columns, lanes, form.groups,
        None if packed.bias is None else packed.bias[:, form.order].contiguous(),
    )  # fmt: skip


def form_of(matrices: RaggedMatrices, gated: bool, lanes: int, device: torch.device) -> Form:
    """Return how a projection is cut; see :func:`repack`."""
    block = FIELDS * lanes
    one = matrices.groups == 1 or GRID not in matrices.schemes
    return Form(
        row_order(matrices.rows, gated=gated).to(device),
        tiles=-(-matrices.rows // TILE),
        blocks=-(-matrices.columns // block),
        lanes=lanes,
        groups=0 if one else block // kernel_group(matrices, block),
    )


Part = tuple[torch.Tensor, torch.Tensor]
"""An expert's planes, int16 [tiles, blocks, bits, 64, lanes], and scales and zeros [tiles, scales per row, 64, 2]."""


def grid_part(packed: PackedMatrices, expert: int, form: Form) -> Part:
    """Repack an expert of the grid."""
    matrices, bits = packed.matrices, packed.matrices.bits[expert]
    stored, *floats = (matrices.view(packed.tensors[suffix], suffix, expert) for suffix in (PACKED, SCALE, ZERO))
    codes = form.pad(unpack(stored, bits, matrices.columns), form.blocks * form.block)
    both = [form.pad(spread(values, matrices, form), form.scales).view(form.tiles, TILE, -1) for values in floats]
    return planes(codes, bits, form.lanes), torch.stack(both, dim=-1).transpose(1, 2)


def trellis_part(packed: PackedMatrices, expert: int, form: Form) -> Part:
    """Repack an expert of the trellis: its words only change places."""
    matrices, bits = packed.matrices, packed.matrices.bits[expert]
    stored, scale = (matrices.view(packed.tensors[suffix], suffix, expert) for suffix in (TRELLIS, ROW_SCALE))
    words = form.pad(stored.contiguous().view(torch.int16), form.blocks * form.lanes * bits)
    scales = form.pad(scale[:, None], 1).view(form.tiles, 1, TILE)
    zeros = torch.full_like(scales, CENTRE - OFFSET)
    return (
        words.view(form.tiles, TILE, form.blocks, form.lanes, bits).permute(0, 2, 4, 1, 3),
        torch.stack((scales, zeros), dim=-1),
    )


REPACKERS: dict[Scheme, Callable[[PackedMatrices, int, Form], Part]] = {
    GRID: grid_part,
    TRELLIS_SCHEME: trellis_part,
}
"""For each scheme that the kernel takes, the function that repacks one of its experts."""


def row_order(rows: int, *, gated: bool) -> torch.Tensor:
    """Return the source row of each row: if ``gated``, eight of gate, eight of up, and so on."""
    index = torch.arange(rows)
    return index.view(2, -1, 8).transpose(0, 1).flatten() if gated else index


def kernel_group(matrices: RaggedMatrices, block: int) -> int:
    """Return the largest group size that divides the block, the checkpoint's group size and the offset within it."""
    if matrices.groups == 1:
        return matrices.columns  # the whole row
    return gcd(matrices.group_size, matrices.group_offset, block)


def spread(values: torch.Tensor, matrices: RaggedMatrices, form: Form) -> torch.Tensor:
    """Return the scales or zeros [rows, groups] repeated for the kernel's groups."""
    first = torch.arange(0, matrices.columns, kernel_group(matrices, form.block), device=values.device)
    return values[:, (first + matrices.group_offset) // matrices.group_size]


def planes(codes: torch.Tensor, bits: int, lanes: int) -> torch.Tensor:
    """Pack uint8 codes [tiles·64, blocks·16·lanes] into int16 [tiles, blocks, bits, 64, lanes]."""
    fields = codes.view(-1, TILE, codes.shape[1] // (FIELDS * lanes), FIELDS, lanes).permute(0, 2, 3, 1, 4)
    words = fields.new_zeros((*fields.shape[:2], bits, *fields.shape[3:]), dtype=torch.int32)
    for field in range(FIELDS):
        if bits == 3 and field == FIELDS - 1:
            for plane in range(bits):
                words[:, :, plane] |= ((fields[:, :, field].int() >> plane) & 1) << 15
        else:
            plane, bit = stored_at(field, bits)
            words[:, :, plane] |= fields[:, :, field].int() << bit
    return words.to(torch.int16)  # the low 16 bits

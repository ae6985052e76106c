"""The trellis: every weight's code is a function of the 12 bits that end with its own (docs/format.md).

A matrix is cut into tiles of 16 rows and 16 columns. A tile's bits form a ring in row-major order of its weights. So 1
to 4 bits per weight choose among codes of 7 bits, whose distribution is about normal, as weights' are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.packing import CODES_PER_BLOCK, pack, packed_words, unpack
from vllm_moeq.format.schemes.base import MAX_MAGNITUDE, Scheme, Span, TensorLayout, check_finite
from vllm_moeq.format.tensors import Tensors

TRELLIS, ROW_SCALE = "weight_trellis", "weight_row_scale"
ROW_SCALE_DTYPES = (torch.float16, torch.bfloat16)

TILE = 16
"""Rows of a tile, and its columns."""
STATE_BITS = 12
"""Bits of a state: the window that ends with a weight's own bits."""
MULTIPLIER = 0x83DCD12D
CENTRE = 63.25
"""The code that would stand for the weight 0."""
TRELLIS_WIDTHS = (1, 2, 3, 4)


@cache
def codes_of_states() -> torch.Tensor:
    """Return the code of each of the 4096 states, uint8 with values from 0 to 127; not to be changed."""
    products = (torch.arange(1 << STATE_BITS, dtype=torch.int64) * MULTIPLIER) & 0xFFFFFFFF
    total = sum((products >> shift) & 0xFF for shift in (0, 8, 16, 24))
    assert isinstance(total, torch.Tensor)
    return (total >> 3).to(torch.uint8)


def _check(rows: int, columns: int, bits: int) -> None:
    if bits not in TRELLIS_WIDTHS:
        raise ValueError(f"bits of a trellis must be one of {TRELLIS_WIDTHS}, got {bits}")
    if rows % TILE or columns % CODES_PER_BLOCK:
        raise ValueError(
            f"a trellis needs a multiple of {TILE} rows and of {CODES_PER_BLOCK} columns, got {[rows, columns]}"
        )


def pack_trellis(own: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the bits that each weight adds to its tile's ring.

    Args:
        own: integers [rows, columns] with values in [0, 2**bits): the topmost bits of every weight's state.
        bits: one of :data:`TRELLIS_WIDTHS`.

    Returns:
        The words of a file, int32 [rows, columns * bits // 32].

    Raises:
        ValueError: the trellis has no such width, rows or columns do not fill tiles, or a value is out of range.
    """
    _check(own.shape[0], own.shape[1], bits)
    # A tile's row lies where the grid has the same 16 codes, so the packing is the grid's.
    return pack(own, bits)


def ring_states(own: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the state of every weight of some tiles.

    Args:
        own: integers [tiles, 256] with values in [0, 2**bits), in the order of the ring.
        bits: one of :data:`TRELLIS_WIDTHS`.

    Returns:
        int16 [tiles, 256] with values from 0 to 4095.
    """
    own = own.to(torch.int16)
    states = own << (STATE_BITS - bits)
    for back in range(1, STATE_BITS // bits):
        states |= own.roll(back, dims=1) << (STATE_BITS - bits * (back + 1))
    return states


def trellis_states(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the state of every weight.

    Args:
        words: int32 [rows, columns * bits // 32], as :func:`pack_trellis` returns them.
        bits: one of :data:`TRELLIS_WIDTHS`.

    Returns:
        int16 [rows, columns] with values from 0 to 4095, on the device of the words.

    Raises:
        ValueError: the trellis has no such width, or rows or columns do not fill tiles.
    """
    rows, columns = words.shape[0], words.shape[1] * 32 // max(bits, 1)
    _check(rows, columns, bits)
    own = unpack(words, bits, columns)
    tiles = own.view(rows // TILE, TILE, columns // TILE, TILE).transpose(1, 2).reshape(-1, TILE * TILE)
    return (
        ring_states(tiles, bits).view(rows // TILE, columns // TILE, TILE, TILE).transpose(1, 2).reshape(rows, columns)
    )


def trellis_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the code of every weight.

    Args:
        words: int32 [rows, columns * bits // 32], as :func:`pack_trellis` returns them.
        bits: one of :data:`TRELLIS_WIDTHS`.

    Returns:
        uint8 [rows, columns] with values from 0 to 127, on the device of the words.

    Raises:
        ValueError: the trellis has no such width, or rows or columns do not fill tiles.
    """
    states = trellis_states(words, bits)
    table = codes_of_states().to(words.device)
    return table.index_select(0, states.reshape(-1).int()).view(states.shape)


class Trellis(Scheme):
    """The scheme with a ring of bits per tile, and a scale per row."""

    name = "trellis"
    suffixes = (TRELLIS, ROW_SCALE)
    checked = (ROW_SCALE,)
    widths = TRELLIS_WIDTHS
    row_step = TILE
    column_step = CODES_PER_BLOCK
    grouped = False

    def layout(
        self,
        rows: int,
        columns: int,
        bits: int,
        group_size: int,  # noqa: ARG002 (for schemes with groups)
        group_offset: int = 0,  # noqa: ARG002
    ) -> dict[str, TensorLayout]:
        """See :meth:`Scheme.layout`: int32 words [rows, columns·bits/32], scales [rows]."""
        words = TensorLayout((torch.int32,), (rows, packed_words(columns, bits)))
        return {TRELLIS: words, ROW_SCALE: TensorLayout(ROW_SCALE_DTYPES, (rows,))}

    def read_shape(self, shards: Tensors, base: str, bits: int, group_size: int) -> tuple[int, int]:  # noqa: ARG002
        """See :meth:`Scheme.read_shape`; the words alone give the shape."""
        name = f"{base}.{TRELLIS}"
        info = shards.info(name)
        if info.dtype != torch.int32 or len(info.shape) != 2:
            raise CheckpointError(
                f"{shards.place(name)}: expected a 2-D int32 tensor, found {info.dtype} {list(info.shape)}"
            )
        rows, words = info.shape
        if rows % TILE or words % bits:
            raise CheckpointError(
                f"{shards.place(name)}: expected a multiple of {TILE} rows and of {bits} words for {bits} bits, "
                f"found {[rows, words]}"
            )
        return rows, words * 32 // bits

    def check_values(self, values: torch.Tensor, suffix: str, place: str) -> None:  # noqa: ARG002 (it has one)
        """See :meth:`Scheme.check_values`; a scale of 0, or one of weights that are too large, is refused too."""
        check_finite(values, place, MAX_MAGNITUDE / (CENTRE + 0.5))
        if bool((values == 0).any()):
            raise CheckpointError(f"{place}: expected no scale of 0")

    def cut(
        self,
        suffix: str,
        bits: int,
        group_size: int,  # noqa: ARG002 (for schemes with groups)
        *,
        rows: Span | None = None,
        columns: Span | None = None,
    ) -> tuple[slice, ...]:
        """See :meth:`Scheme.cut`; whole tiles keep their rings."""
        height = slice(None) if rows is None else slice(*rows)
        if suffix == ROW_SCALE:
            return (height,)
        if columns is None:
            return height, slice(None)
        return height, slice(columns[0] * bits // 32, columns[1] * bits // 32)

    def dequantize(
        self,
        tensors: Mapping[str, torch.Tensor],
        bits: int,
        group_size: int,  # noqa: ARG002 (for schemes with groups)
        group_offset: int = 0,  # noqa: ARG002
    ) -> torch.Tensor:
        """See :meth:`Scheme.dequantize`."""
        weights = trellis_codes(tensors[TRELLIS], bits).float()
        return weights.sub_(CENTRE).mul_(tensors[ROW_SCALE].float()[:, None])


TRELLIS_SCHEME = Trellis()

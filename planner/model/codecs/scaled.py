"""Values of eight or four bits times a scale: per tensor, per row, per group or per block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from planner.model.codecs.codec import VALUES, Codec, Parts
from planner.model.codecs.encoding import Bound, Encoding, Stored
from planner.model.codecs.fp4 import PER_BYTE, fp4_values
from planner.model.codecs.scales import EXPONENTS, FLOATS, SCALE, block_of, finite, scale_values, single
from planner.model.codecs.settings import Settings

GLOBAL, ZERO = "global", "zero"

DEEPSEEK = (128, 128)
"""The block of DeepSeek-V3, where a config names none."""


@dataclass(frozen=True)
class Kind:
    """A kind of values.

    Attributes:
        decode: returns the values of rows as float32.
        scales: dtypes of their scales.
        words: what the values are, for messages.
        packed: number of values in an element.
        group: number of a row's weights that share a scale; None if several numbers are usual.
        overall: joins the scales with one of the whole tensor; None if there is none.
    """

    decode: Callable[[torch.Tensor], torch.Tensor]
    scales: tuple[torch.dtype, ...]
    words: str
    packed: int = 1
    group: int | None = None
    overall: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled(Codec):
    """w = (value − zero point) · scale, where most files have no zero points.

    Attributes:
        kind: the kind of values.
        shape: rows and columns of the stored matrix.
        block: rows and columns that share a scale.
    """

    kind: Kind
    shape: tuple[int, int]
    block: tuple[int, int]

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`."""
        values = self.kind.decode((parts[VALUES].mT if self.exchanged else parts[VALUES])[first:last:step])
        rows = torch.arange(first, last, step)
        if ZERO in parts:
            values = values - self._spread(parts[ZERO].float(), rows)
        return values * self._spread(self._scales(parts), rows)

    def turned(self) -> Codec | None:
        """See :meth:`Codec.turned`; two values in a byte cannot be taken apart."""
        return None if self.kind.packed > 1 else replace(self, exchanged=True)

    def _scales(self, parts: Parts) -> torch.Tensor:
        scales = finite(scale_values(parts[SCALE]), SCALE)
        if self.kind.overall is None:
            return scales
        whole = finite(parts[GLOBAL].float(), GLOBAL)
        return finite(self.kind.overall(scales, whole.reshape(())), GLOBAL)

    def _spread(self, numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return one number per weight of some rows, of one per block."""
        (height, width), block = self.shape, self.block
        grid = numbers.reshape(-(-height // block[0]), -(-width // block[1]))
        if self.exchanged:
            grid, width, block = grid.mT, height, (block[1], block[0])
        picked = grid[rows // block[0]]
        return picked if picked.shape[1] == 1 else picked.repeat_interleave(block[1], dim=1)[:, :width]


def bind_scaled(stored: Stored, settings: Settings, kind: Kind) -> Bound:
    """Return the codec of a matrix, or of a stack of matrices.

    Raises:
        CheckpointError: shapes or dtypes that do not fit together.
    """
    shape = stored.info(VALUES).shape
    if len(shape) not in (2, 3):
        stored.refuse(VALUES, f"{kind.words} in two or three dimensions")
    *stack, rows, packed = shape
    return bind_values(stored, settings, kind, stack, (rows, packed * kind.packed))


def bind_values(stored: Stored, settings: Settings, kind: Kind, stack: list[int], shape: tuple[int, int]) -> Bound:
    """Return the same for values whose shape is known.

    Raises:
        CheckpointError: scales or zero points that do not fit.
    """
    shared = set()
    block = _block(stored, settings, kind, stack, shape)
    if stack and stored.info(SCALE).numel == 1:
        shared.add(SCALE)
    if kind.overall is not None and single(stored, GLOBAL, stack) and stack:
        shared.add(GLOBAL)
    if ZERO in stored.names:
        zero, scale = stored.info(ZERO), stored.info(SCALE)
        if zero.dtype is not torch.int8 or zero.numel != scale.numel or stack:
            stored.refuse(ZERO, f"int8 {list(scale.shape)}, one for each scale")
    codec = Scaled(dtype=settings.dtype, shared=frozenset(shared), kind=kind, shape=shape, block=block)
    return Bound(codec, (*stack, *shape))


def _block(stored: Stored, settings: Settings, kind: Kind, stack: list[int], shape: tuple[int, int]) -> tuple[int, int]:
    info, found = stored.info(SCALE), None
    named = settings.blocks()
    blocks = named or (DEEPSEEK,)
    if info.dtype in kind.scales and (info.numel == 1 or info.shape[: len(stack)] == tuple(stack)):
        own = () if stack and info.numel == 1 else info.shape[len(stack) :]
        found = block_of(shape, own, named) or block_of(shape, own, blocks)
    if found is None or (kind.group is not None and found != (1, kind.group)):
        usual = ("for all", "per row", "per group of a row", *(f"per {high} × {wide}" for high, wide in blocks))
        sizes = f"per {kind.group} weights of a row" if kind.group else ", ".join(usual)
        stored.refuse(SCALE, f"scales of {kind.words} {[*stack, *shape]} {sizes}")
    return found


FLOAT8_KIND = Kind(torch.Tensor.float, (*FLOATS, *EXPONENTS), "float8_e4m3fn")
INT8_KIND = Kind(torch.Tensor.float, FLOATS, "int8")
MXFP4_KIND = Kind(fp4_values, EXPONENTS, "four-bit floats", PER_BYTE, group=32)
NVFP4_KIND = Kind(fp4_values, (torch.float8_e4m3fn,), "four-bit floats", PER_BYTE, group=16, overall=torch.mul)
NVFP4_DIVIDED = replace(NVFP4_KIND, overall=torch.div)

_SCALE = {SCALE: ("_scale_inv", "_scale", ".scale")}
_BYTES = (torch.uint8, torch.int8)

FLOAT8 = Encoding("", (torch.float8_e4m3fn,), partial(bind_scaled, kind=FLOAT8_KIND), _SCALE)
"""DeepSeek's and MiniMax' blocks; tensors, rows, groups and blocks of other tools; MXFP8."""

INT8 = Encoding("", (torch.int8,), partial(bind_scaled, kind=INT8_KIND), _SCALE, {ZERO: ("_zero_point",)})
"""The int-quantized form of compressed-tensors."""

MXFP4 = Encoding("", _BYTES, partial(bind_scaled, kind=MXFP4_KIND), _SCALE)
"""Two values in a byte under the weight's own name: the experts of DeepSeek-V4, and Quark's."""

MXFP4_PACKED = Encoding("_packed", (torch.uint8,), partial(bind_scaled, kind=MXFP4_KIND), {SCALE: ("_scale",)})
"""The mxfp4-pack-quantized form of compressed-tensors."""

NVFP4 = Encoding("", (torch.uint8,), partial(bind_scaled, kind=NVFP4_KIND), {SCALE: ("_scale",), GLOBAL: ("_scale_2",)})
"""Modelopt's form: the scale of the whole tensor is a factor."""

NVFP4_PACKED = Encoding(
    "_packed",
    (torch.uint8,),
    partial(bind_scaled, kind=NVFP4_DIVIDED),
    {SCALE: ("_scale",), GLOBAL: ("_global_scale",)},
)
"""The nvfp4-pack-quantized form of compressed-tensors: the scale of the whole tensor is a divisor."""


def bind_blocks(stored: Stored, settings: Settings) -> Bound:
    """Return the codec of a matrix in blocks of 16 bytes, which are a dimension of their own.

    Raises:
        CheckpointError: shapes or dtypes that do not fit together.
    """
    blocks, scales = stored.info(VALUES), stored.info(SCALE)
    bytes_each = 32 // PER_BYTE
    if len(blocks.shape) not in (3, 4) or blocks.shape != (*scales.shape, bytes_each):
        stored.refuse(
            VALUES,
            f"uint8 [..., groups, {bytes_each}] and scales [..., groups] as {stored.names[SCALE]} {list(scales.shape)}",
        )
    *stack, rows, groups = scales.shape
    kind = replace(MXFP4_KIND, decode=lambda rows_of_blocks: fp4_values(rows_of_blocks.flatten(1)))
    return bind_values(stored, settings, kind, stack, (rows, groups * bytes_each * PER_BYTE))


MXFP4_BLOCKS = Encoding("_blocks", (torch.uint8,), bind_blocks, {SCALE: ("_scales",)})
"""The experts of gpt-oss."""

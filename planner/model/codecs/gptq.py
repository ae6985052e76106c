"""GPTQ's form (AutoGPTQ, GPTQModel): codes packed along the inputs, zero points along the outputs.

For a matrix [N, K] of b bits in G groups: ``qweight`` int32 [K·b/32, N], ``qzeros`` int32 [G, N·b/32], ``scales``
[G, N], and ``g_idx`` int32 [K], the group of each input. Codes are a continuous stream of bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planner.model.codecs.codec import VALUES, Codec, Parts, UnreadableError
from planner.model.codecs.encoding import Bound, Encoding, Stored
from planner.model.codecs.scales import FLOATS, SCALE, finite
from planner.model.codecs.settings import Settings
from planner.model.codecs.words import G_IDX, codes_between, codes_of, column_groups

ZEROS = "zeros"

WIDTHS = (2, 3, 4, 8)

OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` → what is to be added to stored zero points."""

FORMAT_KEYS = ("checkpoint_format", "format")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq(Codec):
    """w = (code − zero point) · scale.

    Attributes:
        bits: width of the codes.
        columns: number of inputs.
        offset: what is to be added to stored zero points.
    """

    bits: int
    columns: int
    offset: int

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`."""
        rows, bits = slice(first, last, step), self.bits
        codes = codes_of(parts[VALUES][:, rows].mT, bits, self.columns)
        scales = finite(parts[SCALE][:, rows].mT.float(), SCALE)
        zeros = codes_between(parts[ZEROS], bits, first, last, step).mT.float()
        if self.offset and bool((zeros == 2**bits - 1).any()):
            found = "0, which programs store in two ways; save the model with checkpoint_format gptq_v2"
            raise UnreadableError(ZEROS, "zero points of 1 or more", found)
        groups = column_groups(parts.get(G_IDX), self.columns, scales.shape[1])
        return (codes.float() - (zeros + self.offset)[:, groups]) * scales[:, groups]

    def turned(self) -> None:
        """See :meth:`Codec.turned`."""
        return


def offset_of(settings: Settings) -> int:
    """Return what is to be added to stored zero points.

    Raises:
        ConfigError: a format that cannot be read; the message names the option.
    """
    given = [key for key in FORMAT_KEYS if settings.options.get(key) is not None]
    for key in given:
        value = settings.options[key]
        if not isinstance(value, str) or value not in OFFSETS or value != settings.options[given[0]]:
            raise settings.refuse(key, " or ".join(OFFSETS))
    if settings.options.get("pack_dtype", "int32") != "int32":
        raise settings.refuse("pack_dtype", "int32")
    if settings.options.get("rotation"):
        raise settings.refuse("rotation", "none, as the inputs would have to be rotated")
    return OFFSETS[settings.options[given[0]]] if given else OFFSETS["gptq"]


def bind_gptq(stored: Stored, settings: Settings) -> Bound:
    """Return the codec of a matrix; the width follows from the shapes.

    Raises:
        CheckpointError: shapes or dtypes that do not fit together.
        ConfigError: see :func:`offset_of`.
    """
    values, scales, zeros = stored.info(VALUES), stored.info(SCALE), stored.info(ZEROS)
    if len(values.shape) != 2:
        stored.refuse(VALUES, "int32 [inputs · bits / 32, outputs]")
    words, rows = values.shape
    if scales.dtype not in FLOATS or len(scales.shape) != 2 or scales.shape[1] != rows:
        stored.refuse(SCALE, f"floats [groups, {rows}]")
    groups = scales.shape[0]
    widths = [bits for bits in WIDTHS if zeros.shape == (groups, rows * bits // 32) and rows * bits % 32 == 0]
    if zeros.dtype is not torch.int32 or not widths:
        stored.refuse(ZEROS, f"int32 [{groups}, {rows} · bits / 32] of {', '.join(map(str, WIDTHS))} bits")
    columns, rest = divmod(words * 32, widths[0])
    if rest:
        stored.refuse(VALUES, f"a whole number of codes of {widths[0]} bits, as in {stored.names[ZEROS]}")
    if G_IDX in stored.names:
        index = stored.info(G_IDX)
        if index.dtype not in (torch.int32, torch.int64) or index.shape != (columns,):
            stored.refuse(G_IDX, f"int32 [{columns}], a group for each input of {widths[0]} bits")
    elif settings.options.get("desc_act") is True and groups > 1:
        stored.refuse(
            VALUES, f"a tensor {stored.weight.removesuffix('weight')}g_idx beside it, as {settings.path} says"
        )
    elif columns % groups:
        stored.refuse(SCALE, f"a number of groups that divides {columns} inputs")
    codec = Gptq(dtype=settings.dtype, bits=widths[0], columns=columns, offset=offset_of(settings))
    return Bound(codec, (rows, columns))


GPTQ = Encoding(".qweight", (torch.int32,), bind_gptq, {ZEROS: (".qzeros",), SCALE: (".scales",)}, {G_IDX: (".g_idx",)})

"""The pack-quantized form of compressed-tensors: codes with an offset of 2^(b−1), in 32-bit words along the inputs.

For a matrix [N, K] of b bits in G groups: ``weight_packed`` int32 [N, K·b/32], ``weight_scale`` [N, G], and perhaps
``weight_zero_point`` int32 [N·b/32, G], packed along the outputs, ``weight_g_idx`` [K], the group of each input, and
``weight_shape``, which must agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planner.model.codecs.codec import VALUES, Codec, Parts, UnreadableError
from planner.model.codecs.encoding import Bound, Encoding, Stored
from planner.model.codecs.gptq import ZEROS
from planner.model.codecs.scales import FLOATS, SCALE, block_of, finite
from planner.model.codecs.settings import Settings
from planner.model.codecs.words import G_IDX, codes_between, codes_of, column_groups

SHAPE = "shape"

WIDTHS = (1, 2, 4, 8)
"""Widths whose codes fill a word."""

INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackQuantized(Codec):
    """w = (code − zero point) · scale; without zero points the offset stands for zero.

    Attributes:
        bits: width of the codes.
        shape: rows and columns.
    """

    bits: int
    shape: tuple[int, int]

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`."""
        (rows, columns), part = self.shape, slice(first, last, step)
        if SHAPE in parts and parts[SHAPE].tolist() != [rows, columns]:
            raise UnreadableError(SHAPE, f"{[rows, columns]}, as the packed codes are", parts[SHAPE].tolist())
        codes = codes_of(parts[VALUES][part], self.bits, columns).float()
        every = finite(parts[SCALE].float(), SCALE)
        scales = every.reshape(-1, 1).expand(rows, 1)[part] if every.numel() == 1 else every.reshape(rows, -1)[part]
        groups = self._groups(parts.get(G_IDX), scales.shape[1])
        if ZEROS in parts:
            zeros = codes_between(parts[ZEROS].mT, self.bits, first, last, step).mT.float()[:, groups]
        else:
            zeros = torch.tensor(float(1 << (self.bits - 1)))
        return (codes - zeros) * scales[:, groups]

    def turned(self) -> None:
        """See :meth:`Codec.turned`."""
        return

    def _groups(self, stored: torch.Tensor | None, groups: int) -> torch.Tensor:
        """Return the group of every column; -1 in the file stands for groups one behind the other."""
        columns = self.shape[1]
        if stored is not None and bool((stored == -1).all()):
            stored = None
        found = column_groups(stored, columns, groups)
        if stored is not None and bool((found.bincount(minlength=groups) != columns // groups).any()):
            raise UnreadableError(G_IDX, f"each of {groups} groups {columns // groups} times", "others")
        return found


def bind_packed(stored: Stored, settings: Settings) -> Bound:
    """Return the codec of a matrix.

    Raises:
        CheckpointError: shapes or dtypes that do not fit together.
    """
    values, scales = stored.info(VALUES), stored.info(SCALE)
    if len(values.shape) != 2:
        stored.refuse(VALUES, "int32 [outputs, inputs · bits / 32]")
    if SHAPE in stored.names and (stored.info(SHAPE).dtype not in INTEGERS or stored.info(SHAPE).shape != (2,)):
        stored.refuse(SHAPE, "two integers")
    bits = _width(stored, settings)
    rows, columns = values.shape[0], values.shape[1] * 32 // bits
    block = block_of((rows, columns), scales.shape, ())
    if scales.dtype not in FLOATS or block is None or block[0] not in (1, rows) or (block[0] != 1 and scales.numel > 1):
        stored.refuse(SCALE, f"floats for all, per row or per group of a row of {[rows, columns]}")
    groups = columns // block[1]
    if ZEROS in stored.names:
        zeros = stored.info(ZEROS)
        if zeros.dtype is not torch.int32 or zeros.shape != (-(-rows * bits // 32), groups):
            stored.refuse(ZEROS, f"int32 {[-(-rows * bits // 32), groups]}")
    elif _asymmetric(settings):
        stored.refuse(VALUES, f"a tensor {stored.weight}_zero_point beside it, as {settings.path} says")
    if G_IDX in stored.names and (stored.info(G_IDX).dtype not in INTEGERS or stored.info(G_IDX).shape != (columns,)):
        stored.refuse(G_IDX, f"int32 [{columns}], a group for each input")
    if G_IDX not in stored.names and groups > 1 and _reordered(settings):
        stored.refuse(VALUES, f"a tensor {stored.weight}_g_idx beside it, as {settings.path} says")
    return Bound(PackQuantized(dtype=settings.dtype, bits=bits, shape=(rows, columns)), (rows, columns))


def _width(stored: Stored, settings: Settings) -> int:
    """Return the width of a weight's codes: the only one that the config has, else by the shape in the file.

    Raises:
        CheckpointError: the shape in the file does not fit any.
        ConfigError: the config has no width that is read.
    """
    named = {group.get("num_bits", 8) for group in settings.weights() if group.get("type", "int") == "int"}
    widths = [bits for bits in WIDTHS if bits in named]
    if not widths:
        raise settings.refuse("config_groups", f"weights of {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} bits")
    if len(widths) > 1 and SHAPE in stored.names:
        found = stored.files.load(stored.names[SHAPE]).tolist()
        widths = [bits for bits in widths if stored.info(VALUES).shape[1] * 32 // bits == found[1]]
    if len(widths) != 1:
        stored.refuse(VALUES, f"codes of one width of {sorted(map(str, named))}, as {SHAPE} beside it says")
    return widths[0]


def _reordered(settings: Settings) -> bool:
    """Tell whether the config says of all weights that their groups do not lie one behind the other."""
    said = [group.get("actorder") for group in settings.weights()]
    return bool(said) and all(order in ("group", True) for order in said)


def _asymmetric(settings: Settings) -> bool:
    """Tell whether the config says of all weights that they have zero points."""
    said = [group.get("symmetric", True) for group in settings.weights()]
    return bool(said) and not any(said)


PACK_QUANTIZED = Encoding(
    "_packed",
    (torch.int32,),
    bind_packed,
    {SCALE: ("_scale",)},
    {ZEROS: ("_zero_point",), G_IDX: ("_g_idx",), SHAPE: ("_shape",)},
)

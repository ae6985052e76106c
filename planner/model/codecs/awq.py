"""AWQ's form ``gemm``: codes of four bits packed along the outputs, eight in a word in an order of its own.

For a matrix [N, K] in G groups: ``qweight`` int32 [K, N/8], ``qzeros`` int32 [G, N/8] and ``scales`` [G, N].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planner.model.codecs.codec import VALUES, Codec, Parts
from planner.model.codecs.encoding import Bound, Encoding, Stored
from planner.model.codecs.gptq import FORMAT_KEYS, ZEROS
from planner.model.codecs.scales import FLOATS, SCALE, finite
from planner.model.codecs.settings import Settings
from planner.model.codecs.words import column_groups

PER_WORD = 8

SHIFTS = tuple(4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7))
"""Where in a word the codes of eight consecutive outputs begin: the word holds outputs 0, 2, 4, 6, 1, 3, 5 and 7."""

VERSIONS = ("gemm", "GEMM")
"""The order of words that is read; ``gemv`` and others have another one."""

VERSION_KEYS = ("version", *FORMAT_KEYS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq(Codec):
    """w = (code − zero point) · scale."""

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`."""
        codes, zeros = (_codes(parts[role], first, last, step) for role in (VALUES, ZEROS))
        scales = finite(parts[SCALE][:, first:last:step].mT.float(), SCALE)
        groups = column_groups(None, codes.shape[1], scales.shape[1])
        return (codes - zeros[:, groups]) * scales[:, groups]

    def turned(self) -> None:
        """See :meth:`Codec.turned`."""
        return


def _codes(words: torch.Tensor, first: int, last: int, step: int) -> torch.Tensor:
    """Return the codes of some outputs, float32 [outputs, rows of words]."""
    begin = first // PER_WORD
    fields = words[:, begin : -(-last // PER_WORD), None] >> torch.tensor(SHIFTS, dtype=torch.int32)
    begin *= PER_WORD
    return (fields & 15).flatten(1)[:, first - begin : last - begin : step].mT.float()


def bind_awq(stored: Stored, settings: Settings) -> Bound:
    """Return the codec of a matrix.

    Raises:
        CheckpointError: shapes or dtypes that do not fit together.
        ConfigError: an order of words that cannot be read.
    """
    for key in VERSION_KEYS:
        if settings.options.get(key, VERSIONS[0]) not in VERSIONS:
            raise settings.refuse(key, VERSIONS[0])
    values, scales, zeros = stored.info(VALUES), stored.info(SCALE), stored.info(ZEROS)
    if len(values.shape) != 2:
        stored.refuse(VALUES, "int32 [inputs, outputs / 8]")
    columns, words = values.shape
    rows = words * PER_WORD
    if scales.dtype not in FLOATS or len(scales.shape) != 2 or scales.shape[1] != rows or columns % scales.shape[0]:
        stored.refuse(SCALE, f"floats [groups, {rows}], where the number of groups divides {columns} inputs")
    if zeros.dtype is not torch.int32 or zeros.shape != (scales.shape[0], words):
        stored.refuse(ZEROS, f"int32 {[scales.shape[0], words]}")
    return Bound(Awq(dtype=settings.dtype), (rows, columns))


AWQ = Encoding(".qweight", (torch.int32,), bind_awq, {ZEROS: (".qzeros",), SCALE: (".scales",)})

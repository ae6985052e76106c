"""Decode codes of a trellis from 16-bit words to exact floats (docs/format.md has the scheme).

A lane holds 16 consecutive weights of its tile's ring in ``width`` words: one row of the tile. A code depends on the
twelve bits that end with its own. They lie in the word in which its own bits end and in the word before; the last word
of the row before comes before the first one. The sum of the product's bytes gets into a mantissa without a shift: the
dot product that adds the bytes also multiplies by 32, so that the code fills a byte, and a permutation of bytes puts it
under the byte of the exponent. A float is the code less :data:`OFFSET`, which keeps sums small.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.format import MULTIPLIER, STATE_BITS
from vllm_moeq.kernels.triton.fields import MANTISSA, ONE, float_of, pair, pattern

OFFSET = 64
"""What a float is less than its code."""

WORD = 16
MASK = (1 << STATE_BITS) - 1
TIMES_32 = 0x20202020
LOWER_HALVES, UPPER_HALVES, BYTES_1_UNDER_3 = 0x5410, 0x7632, 0x3531
"""Selectors of ``prmt``."""


def ring_ptx(place: int, dtype: str) -> str:
    """Return PTX that decodes the code whose own bits end at bit ``place`` of the words in $2, into $0.

    $1 has the words before. A register holds two words or two floats; the states are decoded one by one.
    """
    shift = place + 1 + WORD - STATE_BITS
    lines = ["{ .reg .b32 t, u, f, g;"]
    for target, halves, term in (("t", LOWER_HALVES, ONE[dtype] >> 8 << 24), ("u", UPPER_HALVES, 0)):
        lines.append(f"prmt.b32 {target}, $1, $2, 0x{halves:04x};")
        lines.append(f"shr.b32 {target}, {target}, {shift};")
        if place < WORD - 1:
            lines.append(f"and.b32 {target}, {target}, 0x{MASK:x};")
        lines.append(f"mul.lo.u32 {target}, {target}, 0x{MULTIPLIER:x};")
        lines.append(f"dp4a.u32.u32 {target}, {target}, 0x{TIMES_32:x}, 0x{term:x};")
    lines.append(f"prmt.b32 t, t, u, 0x{BYTES_1_UNDER_3:04x};")
    lines.append(f"mov.b32 f, {pair(pattern(1, dtype))};")
    lines.append(f"mov.b32 g, {pair(pattern(-(2.0 ** MANTISSA[dtype]) - OFFSET, dtype))};")
    lines.append(f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} $0, t, f, g;")
    return "\n".join([*lines, "}"])


PTX = {(place, dtype): ring_ptx(place, dtype) for place in range(WORD) for dtype in ONE}


@triton.constexpr_function
def _ptx(place, dtype):
    return PTX[place, str(dtype)]


@triton.constexpr_function
def _dtypes(dtype):
    return (dtype,)


@triton.constexpr_function
def _end(code, width):
    """Return the word in which a code's own bits end, and the place there."""
    return divmod((code + 1) * width - 1, WORD)


@triton.constexpr_function
def _shift(place):
    return place + 1 + WORD - STATE_BITS


_MASK = tl.constexpr(MASK)
_MULTIPLIER = tl.constexpr(MULTIPLIER - (1 << 32))  # as int32
_OFFSET = tl.constexpr(OFFSET)


@triton.jit
def ring_code_of(words, CODE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr):
    """Return the code with index CODE, less OFFSET and exact in DTYPE; see :func:`fields.code_of`.

    Args:
        words: tensors of int16 words: the last one of the row before, then ``WIDTH`` of this row.
    """
    END: tl.constexpr = _end(CODE, WIDTH)
    before, own = words[END[0]], words[END[0] + 1]
    if MODE == "ptx":
        return tl.inline_asm_elementwise(
            _ptx(END[1], DTYPE), "=r,r,r", (before, own), dtype=_dtypes(DTYPE), is_pure=True, pack=2
        )[0]
    else:
        both = (before.to(tl.int32) & 0xFFFF) | (own.to(tl.int32) << 16)
        product = ((both >> _shift(END[1])) & _MASK) * _MULTIPLIER
        total = (product & 255) + ((product >> 8) & 255) + ((product >> 16) & 255) + ((product >> 24) & 255)
        return float_of((total >> 3).to(tl.int16), DTYPE, MODE) - _OFFSET

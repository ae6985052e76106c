"""Decode codes from 16-bit words to exact floats without an integer-to-float conversion.

A word holds 16 / b codes, least significant first. Sixteen 3-bit codes take three words: five in each, and the last one
in the three top bits. OR-ing a code into the mantissa of 2^m gives 2^m plus the code; a fused multiply-add subtracts
2^m again, exactly. A code that already lies within the mantissa needs no shift, because the multiply-add divides by its
place value. A code of eight bits exceeds bfloat16's mantissa and is decoded in two halves.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from vllm_moeq.format import BIT_WIDTHS

MANTISSA = {"bf16": 7, "fp16": 10}
ONE = {"bf16": 0x4300, "fp16": 0x6400}
"""The bit pattern of 2^mantissa."""

CODES = 16
"""The number of codes in ``b`` words."""


def pattern(value: float, dtype: str) -> int:
    """Return the bit pattern of a value that ``dtype``, 16 bits wide, represents exactly."""
    if dtype == "fp16":
        return int.from_bytes(struct.pack("<e", value), "little")
    return int.from_bytes(struct.pack("<f", value), "little") >> 16


def pair(bits: int) -> str:
    """Return a register of two 16-bit patterns, in hexadecimal digits."""
    return f"0x{bits * 0x10001:08x}"


@triton.constexpr_function
def _place(code, width, dtype):
    per_word = 5 if width == 3 else CODES // width
    fitting = MANTISSA[str(dtype)] // width
    index = code % per_word
    return code // per_word, index // fitting * fitting * width, index % fitting * width


def code_ptx(code: int, width: int, dtype: str) -> str:
    """Return PTX that decodes a code from ``width`` registers, $1 …, into $0.

    A register holds two words or two floats, and every instruction works on both. Bits that a shift moves from one word
    into the other lie above the masks.
    """
    mantissa, one = MANTISSA[dtype], pair(ONE[dtype])
    lines = ["{ .reg .b32 t, u, f, g;"]

    def take(target: str, word: int, shift: int, mask: int, base: str) -> None:
        lines.append(f"shr.b32 t, ${1 + word}, {shift};")
        lines.append(f"lop3.b32 {target}, t, {pair(mask)}, {base}, 0xEA;")  # (t & mask) | base

    def scale(target: str, source: str, factor: float, term: float | str) -> None:
        lines.append(f"mov.b32 f, {pair(pattern(factor, dtype))};")
        lines.append(f"mov.b32 g, {term if isinstance(term, str) else pair(pattern(term, dtype))};")
        lines.append(f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} {target}, {source}, f, g;")

    if width > mantissa:
        take("u", code // 2, code % 2 * 8, 15, one)
        scale("u", "u", 1, -(2.0**mantissa))
        take("t", code // 2, code % 2 * 8 + 4, 15, one)
        scale("t", "t", 16, -(2.0 ** (mantissa + 4)))
        scale("$0", "u", 1, "t")
    elif width == 3 and code == 15:
        for word in range(3):
            take("u", word, 15 - word, 1 << word, one if word == 0 else "u")
        scale("$0", "u", 1, -(2.0**mantissa))
    else:
        word, shift, place = _place.fn(code, width, dtype)
        take("u", word, shift, (2**width - 1) << place, one)
        scale("$0", "u", 2.0**-place, -(2.0 ** (mantissa - place)))
    return "\n".join([*lines, "}"])


PTX = {
    (code, width, dtype): code_ptx(code, width, dtype) for code in range(CODES) for width in BIT_WIDTHS for dtype in ONE
}


@triton.constexpr_function
def _ptx(code, width, dtype):
    return PTX[code, width, str(dtype)]


@triton.constexpr_function
def _constraints(width):
    return ",".join(["=r"] + ["r"] * width)


@triton.constexpr_function
def _dtypes(dtype):
    return (dtype,)


@triton.constexpr_function
def _mantissa(dtype):
    return MANTISSA[str(dtype)]


@triton.constexpr_function
def _one(dtype):
    return ONE[str(dtype)]


@triton.jit
def float_of(bits, PLACE: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr):
    """Return the codes at bit ``PLACE`` of int16 words as floats; all other bits are zero."""
    value = (bits | _one(DTYPE)).to(tl.int16).to(DTYPE, bitcast=True)
    if MODE == "float32":
        value = value.to(tl.float32)
    scale: tl.constexpr = 2.0**-PLACE
    return value * scale - (2.0 ** _mantissa(DTYPE)) * scale


@triton.jit
def code_of(words, CODE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr):
    """Return the code with index CODE in ``WIDTH`` tensors of int16 words, exact in DTYPE.

    Args:
        MODE: "ptx"; "plain" for GPUs without PTX; "float32" for the interpreter, which has no bfloat16 arithmetic.
    """
    if MODE == "ptx":
        return tl.inline_asm_elementwise(
            _ptx(CODE, WIDTH, DTYPE), _constraints(WIDTH), words, dtype=_dtypes(DTYPE), is_pure=True, pack=2
        )[0]
    elif WIDTH > _mantissa(DTYPE):
        word = words[CODE // 2] >> (CODE % 2 * 8)
        return float_of(word & 15, 0, DTYPE, MODE) + float_of((word >> 4) & 15, 0, DTYPE, MODE) * 16
    elif WIDTH == 3 and CODE == 15:
        bits = ((words[0] >> 15) & 1) | ((words[1] >> 14) & 2) | ((words[2] >> 13) & 4)
        return float_of(bits, 0, DTYPE, MODE)
    else:
        PLACE: tl.constexpr = _place(CODE, WIDTH, DTYPE)
        MASK: tl.constexpr = (2**WIDTH - 1) << PLACE[2]
        return float_of((words[PLACE[0]] >> PLACE[1]) & MASK, PLACE[2], DTYPE, MODE)

"""Decode codes from 16-bit words to exact floats without an integer-to-float conversion.

A word holds 16 / b codes, least significant first. Sixteen 3-bit codes take three words: five in each, and the last one
in the three top bits. OR-ing a code into the mantissa of a power of two gives that power plus the code, if the code's
lowest bit stands for one there. The power is the same for all codes of a width, so it is not subtracted here but with
the zero point, once per group; see :func:`offset_of`. It is small where the code lies high in the mantissa, so that
little of float32's accuracy goes into it. A code of eight bits exceeds bfloat16's mantissa: it is decoded in two halves
without an offset.
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


def place_of(width: int, dtype: str) -> int:
    """Return the mantissa's bit that each code's lowest bit gets to, the highest at which a word has a code."""
    return max(MANTISSA[dtype] - width, 0) // width * width


def offset_of(width: int, dtype: str) -> float:
    """Return what each decoded code exceeds its value by."""
    return 2.0 ** (MANTISSA[dtype] - place_of(width, dtype)) if width <= MANTISSA[dtype] else 0.0


def bits_of(code: int, width: int, dtype: str) -> list[tuple[int, int, int]]:
    """Return the word, the right shift (a left one if negative) and the mask of each part of a code."""
    place = place_of(width, dtype)
    if width == 3 and code == CODES - 1:
        return [(word, 15 - word - place, 1 << (word + place)) for word in range(3)]
    word, index = divmod(code, 5 if width == 3 else CODES // width)
    return [(word, index * width - place, (2**width - 1) << place)]


def code_ptx(code: int, width: int, dtype: str) -> str:
    """Return PTX that decodes a code from ``width`` registers, $1 …, into $0.

    A register holds two words or two floats, and every instruction works on both. Bits that a shift moves from one word
    into the other lie outside the masks.
    """
    mantissa = MANTISSA[dtype]
    lines = ["{ .reg .b32 t, u, f, g;"]

    def take(target: str, word: int, shift: int, mask: int, base: str) -> None:
        if shift:
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 t, ${1 + word}, {abs(shift)};")
        lines.append(f"lop3.b32 {target}, {'t' if shift else f'${1 + word}'}, {pair(mask)}, {base}, 0xEA;")

    def scale(target: str, source: str, factor: float, term: float | str) -> None:
        lines.append(f"mov.b32 f, {pair(pattern(factor, dtype))};")
        lines.append(f"mov.b32 g, {term if isinstance(term, str) else pair(pattern(term, dtype))};")
        lines.append(f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} {target}, {source}, f, g;")

    if width > mantissa:
        one = pair(ONE[dtype])
        take("u", code // 2, code % 2 * 8, 15, one)
        scale("u", "u", 1, -(2.0**mantissa))
        take("t", code // 2, code % 2 * 8 + 4, 15, one)
        scale("t", "t", 16, -(2.0 ** (mantissa + 4)))
        scale("$0", "u", 1, "t")
        return "\n".join([*lines, "}"])
    base, parts = pair(pattern(offset_of(width, dtype), dtype)), bits_of(code, width, dtype)
    for index, part in enumerate(parts):
        target = "$0" if index == len(parts) - 1 else "u"
        take(target, *part, base)
        base = target
    return "\n".join([*lines, "}"])


OFFSETS = {(width, dtype): offset_of(width, dtype) for width in BIT_WIDTHS for dtype in ONE}
BASES = {(width, dtype): pattern(value, dtype) for (width, dtype), value in OFFSETS.items()}
KEYS = [(code, width, dtype) for code in range(CODES) for width in BIT_WIDTHS for dtype in ONE]
BITS = {key: bits_of(*key) for key in KEYS}
PTX = {key: code_ptx(*key) for key in KEYS}


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


@triton.constexpr_function
def offset(width, dtype):
    """Return :func:`offset_of` within a kernel."""
    return OFFSETS[width, str(dtype)]


@triton.constexpr_function
def _base(width, dtype):
    return BASES[width, str(dtype)]


@triton.constexpr_function
def _bits(code, width, dtype):
    return BITS[code, width, str(dtype)]


@triton.jit
def _pattern_to_float(bits, DTYPE: tl.constexpr, MODE: tl.constexpr):
    value = bits.to(tl.int16).to(DTYPE, bitcast=True)
    if MODE == "float32":
        value = value.to(tl.float32)
    return value


@triton.jit
def float_of(bits, DTYPE: tl.constexpr, MODE: tl.constexpr):
    """Return int16 words, smaller than 2^m, as floats."""
    return _pattern_to_float(bits | _one(DTYPE), DTYPE, MODE) - 2.0 ** _mantissa(DTYPE)


@triton.jit
def _part(words, WORD: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr):
    if SHIFT < 0:
        return (words[WORD] << -SHIFT) & MASK
    else:
        return (words[WORD] >> SHIFT) & MASK


@triton.jit
def code_of(words, CODE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr):
    """Return the code with index CODE in ``WIDTH`` tensors of int16 words plus their offset, exact in DTYPE.

    Args:
        MODE: "ptx"; "plain" for GPUs without PTX; "float32" for the interpreter, which has no bfloat16 arithmetic.
    """
    if MODE == "ptx":
        return tl.inline_asm_elementwise(
            _ptx(CODE, WIDTH, DTYPE), _constraints(WIDTH), words, dtype=_dtypes(DTYPE), is_pure=True, pack=2
        )[0]
    elif WIDTH > _mantissa(DTYPE):
        word = words[CODE // 2] >> (CODE % 2 * 8)
        return float_of(word & 15, DTYPE, MODE) + float_of((word >> 4) & 15, DTYPE, MODE) * 16
    else:
        PARTS: tl.constexpr = _bits(CODE, WIDTH, DTYPE)
        bits = _part(words, PARTS[0][0], PARTS[0][1], PARTS[0][2])
        for index in tl.static_range(1, len(PARTS)):
            bits = bits | _part(words, PARTS[index][0], PARTS[index][1], PARTS[index][2])
        return _pattern_to_float(bits | _base(WIDTH, DTYPE), DTYPE, MODE)

"""Decode codes from 16-bit words to exact floats without an integer-to-float conversion.

A word holds 16 / b codes. Sixteen 3-bit codes take three words: five in each, and the last one in the three top bits.
OR-ing a code into the mantissa of a power of two gives that power plus the code, if the code's lowest bit stands for
one there. The power is not subtracted here but from the sum over a group; see :func:`offset_of`. There are two ways:

- *equal*: every code is shifted to the highest place of the mantissa that fits, so that all have one small power, which
  is subtracted with the zero point;
- *spread*: several codes of a word lie at places of the mantissa at once, each with the power of its place. In bfloat16
  sixteen codes of 1, 2 and 3 bits then take 3, 4 and 9 shifts instead of 14 or 15; wider ones stay equal, as they would
  take no fewer. The sums of the activations over pairs of fields must be known. The two codes of a pair have the same
  power; :func:`stored_at` orders the codes so that this hardly takes another shift.

A code of eight bits exceeds bfloat16's mantissa: it is decoded in two halves without an offset.
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

WINDOW = 7
"""The mantissa's highest bits, at which spread codes lie: bfloat16 has no more, and more would cost accuracy."""


def pattern(value: float, dtype: str) -> int:
    """Return the bit pattern of a value that ``dtype``, 16 bits wide, represents exactly."""
    if dtype == "fp16":
        return int.from_bytes(struct.pack("<e", value), "little")
    return int.from_bytes(struct.pack("<f", value), "little") >> 16


def pair(bits: int) -> str:
    """Return a register of two 16-bit patterns, in hexadecimal digits."""
    return f"0x{bits * 0x10001:08x}"


def stored_at(code: int, width: int) -> tuple[int, int]:
    """Return the word that has a code, and the bit of it at which the code begins.

    Codes 2·i and 2·i + 1 are a pair. They lie at the same bits of two words, or in one word so far apart that the shift
    for other codes brings one to where the other is, if there are such bits. The last 3-bit code begins there, and has
    the top bits of the next two words too.
    """
    index, second = divmod(code, 2)
    if width == 1:
        return 0, code if index == WINDOW else index + second * WINDOW
    if width == 3 and code >= 10:
        return ((2, 0), (2, 6), (2, 3), (2, 9), (2, 12), (0, 15))[code - 10]
    per_word = CODES // width
    return index // per_word * 2 + second, index % per_word * width


def place_of(code: int, width: int, dtype: str, spread: bool) -> int:
    """Return the mantissa's bit that a code's lowest bit gets to."""
    mantissa = MANTISSA[dtype]
    if not spread or WINDOW // width < 2:
        return max(mantissa - width, 0) // width * width
    bit = stored_at(code - code % 2, width)[1]
    return mantissa - WINDOW + bit // width % (WINDOW // width) * width


def offset_of(code: int, width: int, dtype: str, spread: bool) -> float:
    """Return what a decoded code exceeds its value by."""
    place = place_of(code, width, dtype, spread)
    return 2.0 ** (MANTISSA[dtype] - place) if width <= MANTISSA[dtype] else 0.0


def bits_of(code: int, width: int, dtype: str, spread: bool) -> list[tuple[int, int, int]]:
    """Return the word, the right shift (a left one if negative) and the mask of each part of a code."""
    place = place_of(code, width, dtype, spread)
    if width == 3 and code == CODES - 1:
        return [(word, 15 - word - place, 1 << (word + place)) for word in range(3)]
    word, bit = stored_at(code, width)
    return [(word, bit - place, (2**width - 1) << place)]


def code_ptx(code: int, width: int, dtype: str, spread: bool) -> str:
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
        word, bit = stored_at(code, width)
        take("u", word, bit, 15, one)
        scale("u", "u", 1, -(2.0**mantissa))
        take("t", word, bit + 4, 15, one)
        scale("t", "t", 16, -(2.0 ** (mantissa + 4)))
        scale("$0", "u", 1, "t")
        return "\n".join([*lines, "}"])
    base = pair(pattern(offset_of(code, width, dtype, spread), dtype))
    parts = bits_of(code, width, dtype, spread)
    for index, part in enumerate(parts):
        target = "$0" if index == len(parts) - 1 else "u"
        take(target, *part, base)
        base = target
    return "\n".join([*lines, "}"])


KEYS = [
    (code, width, dtype, spread)
    for code in range(CODES)
    for width in BIT_WIDTHS
    for dtype in ONE
    for spread in (False, True)
]
OFFSETS = {key: offset_of(*key) for key in KEYS}
BASES = {key: pattern(value, key[2]) for key, value in OFFSETS.items()}
BITS = {key: bits_of(*key) for key in KEYS if key[1] <= MANTISSA[key[2]]}
STORED = {(code, width): stored_at(code, width) for code in range(CODES) for width in BIT_WIDTHS}
PTX = {key: code_ptx(*key) for key in KEYS}


@triton.constexpr_function
def _ptx(code, width, dtype, spread):
    return PTX[code, width, str(dtype), spread]


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
def offset(code, width, dtype, spread):
    """Return :func:`offset_of` within a kernel."""
    return OFFSETS[code, width, str(dtype), spread]


@triton.constexpr_function
def differ(width, dtype, spread):
    """Tell whether the codes of a width have different offsets."""
    return len({OFFSETS[code, width, str(dtype), spread] for code in range(CODES)}) > 1


@triton.constexpr_function
def _base(code, width, dtype, spread):
    return BASES[code, width, str(dtype), spread]


@triton.constexpr_function
def _bits(code, width, dtype, spread):
    return BITS[code, width, str(dtype), spread]


@triton.constexpr_function
def _stored(code, width):
    return STORED[code, width]


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
def code_of(
    words, CODE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, SPREAD: tl.constexpr, MODE: tl.constexpr
):
    """Return the code with index CODE in ``WIDTH`` tensors of int16 words plus its offset, exact in DTYPE.

    Args:
        SPREAD: whether codes have the offsets of their places.
        MODE: "ptx"; "plain" for GPUs without PTX; "float32" for the interpreter, which has no bfloat16 arithmetic.
    """
    if MODE == "ptx":
        return tl.inline_asm_elementwise(
            _ptx(CODE, WIDTH, DTYPE, SPREAD), _constraints(WIDTH), words, dtype=_dtypes(DTYPE), is_pure=True, pack=2
        )[0]
    elif WIDTH > _mantissa(DTYPE):
        STORED: tl.constexpr = _stored(CODE, WIDTH)
        word = words[STORED[0]] >> STORED[1]
        return float_of(word & 15, DTYPE, MODE) + float_of((word >> 4) & 15, DTYPE, MODE) * 16
    else:
        PARTS: tl.constexpr = _bits(CODE, WIDTH, DTYPE, SPREAD)
        bits = _part(words, PARTS[0][0], PARTS[0][1], PARTS[0][2])
        for index in tl.static_range(1, len(PARTS)):
            bits = bits | _part(words, PARTS[index][0], PARTS[index][1], PARTS[index][2])
        return _pattern_to_float(bits | _base(CODE, WIDTH, DTYPE, SPREAD), DTYPE, MODE)

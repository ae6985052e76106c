"""The PTX that turns codes into floats, run word by word: no GPU is needed to know that it is right."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest

from vllm_moeq.format import BIT_WIDTHS, codes_of_states
from vllm_moeq.kernels.triton import rings
from vllm_moeq.kernels.triton.fields import PTX, bits_of, offset_of


def to_float(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "fp16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round-trip: every intermediate value is exact, so any rounding would be an error of the code."""
    bits: np.ndarray
    if dtype == "fp16":
        bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        bits = values.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), "not exact in bfloat16"
        bits = bits >> 16
    assert np.array_equal(to_float(bits, dtype), values), f"not exact in {dtype}"
    return bits


def execute(text: str, inputs: list[np.ndarray], dtype: str) -> np.ndarray:
    """Run the instructions that the snippets use, on arrays of 32-bit registers."""
    registers = {f"${index + 1}": value.astype(np.uint32) for index, value in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(inputs[0], int(name, 0), dtype=np.uint32)

    for line in text.splitlines():
        match = re.fullmatch(r"([a-z][a-z0-9.]+) (\S+), (.+);", line)
        if match is None:
            assert line in ("}", "{ .reg .b32 t, u, f, g;")
            continue
        opcode, target, operands = match[1], match[2], match[3].split(", ")
        if opcode == "mov.b32":
            result = value(operands[0])
        elif opcode == "shr.b32":
            result = value(operands[0]) >> value(operands[1])
        elif opcode == "shl.b32":
            result = value(operands[0]) << value(operands[1])
        elif opcode == "lop3.b32":
            assert operands[3] == "0xEA"
            result = (value(operands[0]) & value(operands[1])) | value(operands[2])
        elif opcode == "and.b32":
            result = value(operands[0]) & value(operands[1])
        elif opcode == "mul.lo.u32":
            result = value(operands[0]) * value(operands[1])
        elif opcode == "prmt.b32":
            both = np.stack([value(operands[0]), value(operands[1])], axis=-1).astype("<u4").view(np.uint8)
            selected = [int(operands[2], 0) >> 4 * place & 7 for place in range(4)]
            result = np.ascontiguousarray(both[..., selected]).view("<u4")[..., 0]
        elif opcode == "dp4a.u32.u32":
            left, right = (value(name).astype("<u4")[..., None].view(np.uint8) for name in operands[:2])
            result = (left.astype(np.uint32) * right).sum(-1, dtype=np.uint32) + value(operands[2])
        else:
            assert opcode == {"bf16": "fma.rn.bf16x2", "fp16": "fma.rn.f16x2"}[dtype]
            halves = []
            for shift in (0, 16):
                a, b, c = (to_float((value(name) >> shift) & 0xFFFF, dtype) for name in operands)
                halves.append(from_float(a * b + c, dtype))
            result = halves[0] | halves[1] << 16
        registers[target] = result.astype(np.uint32)
    return registers["$0"]


def expected_codes(words: list[np.ndarray], width: int) -> list[np.ndarray]:
    """Read the codes of 16-bit words; which bits have which code is written here once more."""
    halves = 2**width - 1
    if width == 1:
        order = [bit for pair in zip(range(7), range(7, 14), strict=True) for bit in pair] + [14, 15]
        return [(words[0] >> bit) & 1 for bit in order]
    if width == 3:
        found = [(words[index % 2] >> (index // 2 * 3)) & 7 for index in range(10)]
        found += [(words[2] >> bit) & 7 for bit in (0, 6, 3, 9, 12)]
        top = [((words[index] >> 15) & 1) << index for index in range(3)]
        return [*found, top[0] | top[1] | top[2]]
    found = []
    for first in range(0, width, 2):
        for bit in range(0, 16, width):
            found += [(words[first] >> bit) & halves, (words[first + 1] >> bit) & halves]
    return found


def test_every_bit_of_the_words_belongs_to_one_code() -> None:
    for width in BIT_WIDTHS:
        seen = np.zeros((width, 16), dtype=int)
        for word in range(width):
            for bit in range(16):
                words = [np.array([0]) for _ in range(width)]
                words[word] = np.array([1 << bit])
                seen[word, bit] = sum(int(code[0] != 0) for code in expected_codes(words, width))
        assert (seen == 1).all(), width


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("width", BIT_WIDTHS)
def test_every_code_of_every_word(width: int, dtype: str, spread: bool) -> None:
    generator = np.random.default_rng(width)
    low, high = (generator.permutation(65536).astype(np.uint32) for _ in range(2))
    lows = [np.roll(low, index) for index in range(width)]
    highs = [np.roll(high, index) for index in range(width)]
    registers = [a | b << 16 for a, b in zip(lows, highs, strict=True)]
    expected = list(zip(expected_codes(lows, width), expected_codes(highs, width), strict=True))
    for code in range(16):
        offset = offset_of(code, width, dtype, spread)
        result = execute(PTX[code, width, dtype, spread], registers, dtype)
        assert np.array_equal(to_float(result & 0xFFFF, dtype) - offset, expected[code][0])
        assert np.array_equal(to_float(result >> 16, dtype) - offset, expected[code][1])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("width", BIT_WIDTHS)
def test_equal_offsets_leave_the_accuracy_to_the_codes(width: int, dtype: str) -> None:
    """A sum of codes plus offsets loses at most three bits more of float32 than one of the largest codes."""
    offsets = {offset_of(code, width, dtype, False) for code in range(16)}
    assert len(offsets) == 1
    assert offsets.pop() <= 9 * (2**width - 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("width", BIT_WIDTHS)
def test_spread_codes_have_one_offset_per_pair_and_few_shifts(width: int, dtype: str) -> None:
    """Sums of activations are over two fields; an offset over 128 would cost more than seven bits of float32."""
    offsets = [offset_of(code, width, dtype, True) for code in range(16)]
    assert offsets[::2] == offsets[1::2]
    assert width > 7 or max(offsets) <= 128
    if width <= 7:
        parts = [part for code in range(16) for part in bits_of(code, width, dtype, True)]
        shifts = {(word, shift) for word, shift, _ in parts if shift}
        assert len(shifts) == {"bf16": {1: 3, 2: 4, 3: 9}, "fp16": {1: 4, 2: 6, 3: 12}}[dtype].get(width, 12)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("place", range(16))
def test_every_state_of_a_ring(place: int, dtype: str) -> None:
    """The window of twelve bits that ends at a place of a word begins in the word before."""
    generator = np.random.default_rng(place)
    before, own = (generator.integers(0, 1 << 32, 1 << 17, dtype=np.uint32) for _ in range(2))
    result = execute(rings.PTX[place, dtype], [before, own], dtype)
    codes = codes_of_states().numpy().astype(np.float64)
    for lane in (0, 16):
        both = ((before >> lane) & 0xFFFF) | ((own >> lane) & 0xFFFF) << 16
        states = (both >> (place + 5)) & 0xFFF
        assert len(np.unique(states)) == 4096
        assert np.array_equal(to_float((result >> lane) & 0xFFFF, dtype), codes[states] - rings.OFFSET)


def test_struct_agrees_with_numpy() -> None:
    assert to_float(np.array([0x6400]), "fp16")[0] == struct.unpack("<e", b"\x00\x64")[0] == 1024
    assert to_float(np.array([0x4300]), "bf16")[0] == 128

"""The PTX that turns codes into floats, run word by word: no GPU is needed to know that it is right."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest

from vllm_moeq.format import BIT_WIDTHS, codes_of_states
from vllm_moeq.kernels.triton import rings
from vllm_moeq.kernels.triton.fields import PTX, offset_of


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


def expected_code(words: list[np.ndarray], code: int, width: int) -> np.ndarray:
    """Read a code as the repacking documents it, from 16-bit words."""
    if width == 3 and code == 15:
        bits = [((words[index] >> 15) & 1) << index for index in range(3)]
        return bits[0] | bits[1] | bits[2]
    per_word = 5 if width == 3 else 16 // width
    return (words[code // per_word] >> (code % per_word * width)) & (2**width - 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("width", BIT_WIDTHS)
def test_every_code_of_every_word(width: int, dtype: str) -> None:
    generator = np.random.default_rng(width)
    low, high = (generator.permutation(65536).astype(np.uint32) for _ in range(2))
    lows = [np.roll(low, index) for index in range(width)]
    highs = [np.roll(high, index) for index in range(width)]
    registers = [a | b << 16 for a, b in zip(lows, highs, strict=True)]
    offset = offset_of(width, dtype)
    for code in range(16):
        result = execute(PTX[code, width, dtype], registers, dtype)
        assert np.array_equal(to_float(result & 0xFFFF, dtype) - offset, expected_code(lows, code, width))
        assert np.array_equal(to_float(result >> 16, dtype) - offset, expected_code(highs, code, width))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("width", BIT_WIDTHS)
def test_offsets_leave_the_accuracy_to_the_codes(width: int, dtype: str) -> None:
    """A sum of codes plus offsets loses at most three bits more of float32 than one of the largest codes."""
    assert offset_of(width, dtype) <= 9 * (2**width - 1)


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

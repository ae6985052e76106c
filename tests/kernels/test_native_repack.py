"""The order in memory of ``csrc/core.h``, read back in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.layers import random_matrices
from vllm_moeq.format import BIT_WIDTHS, unpack
from vllm_moeq.kernels import PackedMatrices
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.cpu.layer import repack

pytestmark = [pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there"), pytest.mark.compiler]


def chunk_codes(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes [16, 32] of one chunk, given uint8 [bits, 16, 4]."""
    codes = torch.zeros(16, 32, dtype=torch.int64)
    words = vectors.long()
    for k in range(32):
        step, j = divmod(k, 4)
        if bits == 3:
            word, t = divmod(step, 3)
            codes[:, k] = words[word, :, j] >> 3 * t & 7
            if t == 2:  # bits 6 and 7, and bit 6 or 7 of the last word
                codes[:, k] |= (words[2, :, j] >> 6 + word & 1) << 2
        else:
            word, t = divmod(step, 8 // bits)
            codes[:, k] = words[word, :, j] >> bits * t & (1 << bits) - 1
    return codes


def read_back(data: torch.Tensor, packed: PackedMatrices, expert: int, gated: bool) -> tuple[torch.Tensor, ...]:
    """Return codes [rows, columns], scales and zeros [rows, groups]."""
    m, bits = packed.matrices, packed.matrices.bits[expert]
    half = m.rows // 2 if gated else m.rows
    codes = torch.zeros(m.rows, m.columns, dtype=torch.int64)
    scales, zeros = torch.zeros_like(packed.scales[expert]), torch.zeros_like(packed.zeros[expert])
    place = 0
    for panel in range(-(-half // (16 if gated else 32))):
        column = 0
        before = -1
        while column < m.columns:
            group = (m.group_offset + column) // m.group_size
            end = min(m.columns, (group + 1) * m.group_size - m.group_offset, column + 128)
            for block in range(2):
                first = panel * 16 if gated else panel * 32 + block * 16
                count = max(0, min(16, half - first))
                rows = (
                    slice(first + block * half, first + block * half + count) if gated else slice(first, first + count)
                )
                if group != before:
                    size = 32 * scales.element_size()
                    header = data[place : place + size].clone().view(scales.dtype).view(2, 16)
                    scales[rows, group], zeros[rows, group] = header[0, :count], header[1, :count]
                    assert not header[:, count:].any()
                    place += size
                for begin in range(column, end, 32):
                    vectors = data[place : place + 64 * bits].view(bits, 16, 4)
                    codes[rows, begin : begin + 32] = chunk_codes(vectors, bits)[:count]
                    place += 64 * bits
            column, before = end, group
    assert place == data.numel()
    return codes, scales, zeros


@settings(max_examples=40, deadline=None)
@given(
    bits=st.lists(st.sampled_from(BIT_WIDTHS), min_size=1, max_size=3),
    half_rows=st.integers(1, 40),
    chunks=st.integers(1, 9),
    group_chunks=st.integers(1, 6),
    offset_chunks=st.integers(0, 5),
    gated=st.booleans(),
    wide=st.booleans(),
)
def test_repacked_codes_are_the_codes(
    bits: list[int], half_rows: int, chunks: int, group_chunks: int, offset_chunks: int, gated: bool, wide: bool
) -> None:
    offset = offset_chunks % group_chunks * 32
    packed = random_matrices(bits, 2 * half_rows, 32 * chunks, 32 * group_chunks, offset)
    if wide:
        packed = PackedMatrices(packed.matrices, packed.words, packed.scales.float(), packed.zeros.float())
    data, offsets = repack(packed, gated=gated)
    ends = [*offsets.tolist()[1:], data.numel()]
    for expert, (begin, end) in enumerate(zip(offsets.tolist(), ends, strict=True)):
        codes, scales, zeros = read_back(data[begin:end], packed, expert, gated)
        first, last = packed.matrices.offsets[expert : expert + 2]
        words = packed.words[first:last].view(packed.matrices.rows, -1)
        assert torch.equal(codes, unpack(words, bits[expert], 32 * chunks).long())
        assert torch.equal(scales, packed.scales[expert])
        assert torch.equal(zeros, packed.zeros[expert])


@pytest.mark.parametrize("gated", [False, True])
def test_repacked_size_is_the_format_s(gated: bool) -> None:
    """No byte is added where rows fill blocks."""
    packed = random_matrices([1, 2, 3, 4, 8], 128, 1024, 128)
    data, _ = repack(packed, gated=gated)
    assert data.nbytes == packed.words.nbytes + packed.scales.nbytes + packed.zeros.nbytes

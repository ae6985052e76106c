"""The launch before a projection whose inputs are rotated, or needed in another order of columns."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.records import look_up


@triton.jit
def _hadamard(SIZE: tl.constexpr):
    """Return the Hadamard matrix in Sylvester's order, SIZE up to 16, float32."""
    index = tl.arange(0, SIZE)
    both = index[:, None] & index[None, :]
    both ^= both >> 2
    both ^= both >> 1
    return 1.0 - 2.0 * (both & 1).to(tl.float32)


@triton.jit
def _rotated(values, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Return the Hadamard matrix of SIZE times each part of float32 values [BLOCK], over √SIZE.

    The matrix is the Kronecker product of one of SIZE / 16 and one of 16.
    """
    low = tl.sum(values.reshape(BLOCK // 16, 16, 1) * _hadamard(16)[None, :, :], axis=1)
    if SIZE > 16:
        HIGH: tl.constexpr = SIZE // 16
        high = low.reshape(BLOCK // SIZE, HIGH, 1, 16) * _hadamard(HIGH)[None, :, :, None]
        low = tl.sum(high, axis=1)
    scale: tl.constexpr = SIZE**-0.5
    return low.reshape(BLOCK) * scale


@triton.jit(do_not_specialize=["columns", "pairs"], do_not_specialize_on_alignment=["local", "ids"])
def arrange(
    x, local, signs, out, sums, columns, padded, ids, pairs, up, down, splits, records,
    LANES: tl.constexpr, SIZE: tl.constexpr, PLAIN: tl.constexpr, RINGS: tl.constexpr, SUM: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Rotate rows, and store them in the orders of columns that codings read, and their sums, and records of pairs.

    Grid: (rows, blocks + TOP_K). The last TOP_K programs of a row look up the pairs of its token; see
    :func:`records.look_up` for their arguments.

    Args:
        x: rows [rows, columns].
        local: local expert indices [rows]; rows with negative ones are skipped. None skips none.
        signs: the rotation's signs, a bit per column, int32 [columns / 32]; unused if SIZE is 0.
        out: the copies [PLAIN + RINGS, rows, padded], written. If PLAIN, one has the columns in their order; if RINGS,
            the last one has column 16·lane + field of a block at field·LANES + lane.
        sums: sums of what is stored over SUM columns, float32 [rows, padded / SUM], written.
        columns: columns of x.
        padded: columns rounded up to blocks of 16·LANES; zeros come behind x's.
    """
    BLOCK: tl.constexpr = 16 * LANES
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if TOP_K:
        blocks = tl.num_programs(1) - TOP_K
        if block >= blocks:
            pair = tl.program_id(0) * TOP_K + block - blocks
            look_up(ids, pairs, pair, up, down, splits, records, TOKENS, PAIRS)
            return
    if local is not None:
        if tl.load(local + row) < 0:
            return
    inner = tl.arange(0, BLOCK)
    column = block * BLOCK + inner
    value = tl.load(x + row * columns + column, mask=column < columns, other=0.0)
    if SIZE:
        word = tl.load(signs + column // 32, mask=column < columns, other=0)
        signed = value.to(tl.float32) * (1 - 2 * (word >> (column % 32) & 1)).to(tl.float32)
        value = _rotated(signed, BLOCK, SIZE).to(value.dtype)
    parts = tl.sum(value.to(tl.float32).reshape(BLOCK // SUM, SUM), axis=1)
    tl.store(sums + row * (padded // SUM) + block * (BLOCK // SUM) + tl.arange(0, BLOCK // SUM), parts)
    target = out + row * padded + block * BLOCK
    if PLAIN:
        tl.store(target + inner, value)
    if RINGS:
        behind = tl.num_programs(0).to(tl.int64) * padded * PLAIN
        tl.store(target + behind + inner % 16 * LANES + inner // 16, value)

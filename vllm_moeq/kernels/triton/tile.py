"""A tile of output neurons times a few tokens, for one expert of any coding."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.activate import function_of, gate_times_up
from vllm_moeq.kernels.triton.codings import COUNT, copy_of, is_ring, width_of
from vllm_moeq.kernels.triton.fields import code_of, offset
from vllm_moeq.kernels.triton.rings import ring_code_of

TILE = tl.constexpr(64)
"""The rows that lie together in memory."""


@triton.jit
def _load_words(pointers, WIDTH: tl.constexpr, PLANE: tl.constexpr):
    words = (tl.load(pointers),)
    for plane in tl.static_range(1, WIDTH):
        words = words + (tl.load(pointers + plane * PLANE),)  # type: ignore[assignment]  # noqa: RUF005
    return words


@triton.jit
def _row_before(row, GATED: tl.constexpr):
    """Return the row whose bits come before each row's in the ring of its 16 rows; if GATED, see ``row_order``."""
    if GATED:
        place = row // 16 % 2 * 8 + row % 8
        before = (place + 15) % 16
        return row // 32 * 32 + before // 8 * 16 + row // 8 % 2 * 8 + before % 8
    else:
        return row // 16 * 16 + (row + 15) % 16


@triton.jit
def _load_scale_and_zero(pairs):
    both = tl.load(pairs)
    if both.dtype == tl.int32:
        scale = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        return scale, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(
    words, before, scales, x, sums, lane, columns, begin, end,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr, LANES: tl.constexpr,
    GROUPS: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Return Σ_k (q − z)·s·x over the blocks [begin, end), float32 [ROWS, TOKENS].

    Each group is computed as s·(Σ x·q − z·Σ x), because the codes q are exact in the activation's dtype. Codes of the
    grid are multiplied with their offset on them, which is subtracted with z. The words of the rows ``before`` are read
    if RING: their last plane, which this program reads for those rows too.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PLANE: tl.constexpr = TILE * LANES
    PARTS: tl.constexpr = GROUPS if GROUPS else 1
    FIELDS: tl.constexpr = 16 // PARTS
    OFFSET: tl.constexpr = 0.0 if RING else offset(WIDTH, dtype)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    total_x = tl.zeros((TOKENS,), tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        planes = _load_words(words + block * (WIDTH * PLANE), WIDTH, PLANE)
        if RING:
            planes = (tl.load(before + (block * WIDTH + WIDTH - 1) * PLANE),) + planes  # noqa: RUF005
        start = block * (16 * LANES)
        for group in tl.static_range(PARTS):
            part = tl.zeros((ROWS, TOKENS), tl.float32)
            for field in tl.static_range(FIELDS):
                at = start + (group * FIELDS + field) * LANES
                inputs = tl.load(x + at) if EVEN else tl.load(x + at, mask=lane + at < columns, other=0.0)
                if MODE == "float32":
                    inputs = inputs.to(tl.float32)
                if RING:
                    codes = ring_code_of(planes, group * FIELDS + field, WIDTH, dtype, MODE)
                else:
                    codes = code_of(planes, group * FIELDS + field, WIDTH, dtype, MODE)
                part = tl.dot(codes, inputs, part, input_precision="ieee")
            part_x = tl.zeros((TOKENS,), tl.float32)
            for index in tl.static_range(FIELDS * LANES // SUM):
                part_x += tl.load(sums + (start + group * FIELDS * LANES) // SUM + index)
            if GROUPS:
                scale, zero = _load_scale_and_zero(scales + (block * GROUPS + group) * TILE)
                if OFFSET > 0:
                    zero += OFFSET
                total += scale[:, None] * (part - zero[:, None] * part_x[None, :])
            else:
                total += part
                total_x += part_x
    if not GROUPS:
        scale, zero = _load_scale_and_zero(scales)
        if OFFSET > 0:
            zero += OFFSET
        total = scale[:, None] * (total - zero[:, None] * total_x[None, :])
    return total


@triton.jit
def expert_tile(
    x, sums, words, scales, table, expert, tile, split, splits, source, sources, valid, columns, tiles,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, CODINGS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr,
    SUM: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Return the rows from tile·ROWS on of one expert times the tokens ``source``, float32 [ROWS, TOKENS].

    The kernel branches on the coding once. Only those in ``CODINGS`` are compiled; its bit i stands for number i. Their
    inputs are copies of ``sources`` rows each; see :func:`vllm_moeq.kernels.triton.codings.copy_of`.
    """
    entry = table + expert * 3
    coding, first_word, first_scale = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    blocks = tl.cdiv(columns, 16 * LANES)
    begin, end = blocks * split // splits, blocks * (split + 1) // splits
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    first = tile * (ROWS // TILE)
    # The last program may reach past the last tile: it reads that one again, and stores nothing of it.
    among = first + tl.minimum(row // TILE, tiles - 1 - first) if ROWS > TILE else first + row // TILE
    inner = row % TILE
    source = tl.where(valid, source, 0).to(tl.int64)
    inputs = x + source[None, :] * columns + lane[:, None]
    input_sums = sums + source * (blocks * (16 * LANES // SUM))
    base = words + first_word.to(tl.int64) * (TILE * LANES)  # a product has a known alignment
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for CODING in tl.static_range(COUNT):
        if CODINGS & (1 << CODING):
            if coding == CODING:
                at = among * (blocks * width_of(CODING) * TILE * LANES)
                groups = 1 if is_ring(CODING) or not GROUPS else blocks * GROUPS
                total = _multiply(
                    base + (at + inner * LANES)[:, None] + lane[None, :],
                    base + (at + _row_before(inner, GATED) * LANES)[:, None] + lane[None, :],
                    scales + (first_scale.to(tl.int64) + among * groups) * TILE + inner,
                    inputs + sources.to(tl.int64) * columns * copy_of(CODING, CODINGS), input_sums,
                    lane[:, None], columns, begin, end,
                    ROWS, TOKENS, width_of(CODING), is_ring(CODING), LANES, 0 if is_ring(CODING) else GROUPS,
                    SUM, EVEN, STAGES, MODE,
                )  # fmt: skip
    return total


@triton.jit
def add_bias(total, biases, expert, tile, rows, wanted, ROWS: tl.constexpr):
    """Return the rows of one tile with an expert's biases, float32 [E, rows], if they are wanted and there are any."""
    if biases is not None:
        row = tile * ROWS + tl.arange(0, ROWS)
        bias = tl.load(biases + expert.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        total += tl.where(wanted, bias, 0.0)[:, None]
    return total


@triton.jit
def store_hidden(
    total, hidden, sums, pair, valid, tile, rows, sum_columns, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    GATED: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Store down's inputs [pairs, neurons], and if there are sums, those over chunks of 32 neurons.

    The rows of ``total`` are eight of gate and eight of up in turn, or if not GATED up's alone.
    """
    HALF: tl.constexpr = ROWS // 2 if GATED else ROWS
    neurons = rows // 2 if GATED else rows
    if GATED:
        halves = total.reshape(ROWS // 16, 2, 8, TOKENS).permute(0, 2, 3, 1)
        gate, up = tl.split(halves)
        result = gate_times_up(gate, up, FUNCTION, ALPHA, LIMIT, BETA).reshape(HALF, TOKENS)
    else:
        result = function_of(total, FUNCTION, ALPHA)
    value = result.to(hidden.dtype.element_ty)
    neuron = tile * HALF + tl.arange(0, HALF)
    target = hidden + pair.to(tl.int64)[None, :] * neurons + neuron[:, None]
    inside = valid[None, :] & (neuron < neurons)[:, None]
    tl.store(target, value, mask=inside)
    if sums is not None:
        exact = tl.where(inside, value.to(tl.float32), 0.0)
        chunk = tl.arange(0, HALF // 32)
        chunk_sums = tl.sum(exact.reshape(HALF // 32, 32, TOKENS), axis=1)
        at = tile * (HALF // 32) + chunk
        tl.store(
            sums + pair[None, :] * sum_columns + at[:, None],
            chunk_sums,
            mask=valid[None, :] & (at < neurons // 32)[:, None],
        )


@triton.jit
def store_weighted(total, out, weights, pair, valid, tile, rows, ROWS: tl.constexpr):
    """Store the result times the routing weight, [pairs, rows]."""
    weight = tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)
    row = tile * ROWS + tl.arange(0, ROWS)
    target = out + pair.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(target, (total * weight[None, :]).to(out.dtype.element_ty), mask=valid[None, :] & (row < rows)[:, None])

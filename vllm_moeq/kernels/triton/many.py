"""The two launches of a layer for any number of tokens, sorted by expert."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.codings import COUNT, copy_of, is_ring, width_of
from vllm_moeq.kernels.triton.fields import code_of, offset
from vllm_moeq.kernels.triton.rings import ring_code_of
from vllm_moeq.kernels.triton.tile import TILE, beside, finish, load_words, scale_and_zero, words_at


@triton.jit
def _sorted_block(order, counts, block, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return expert, pairs [TOKENS] and validity of a block of sorted pairs; past the end the expert is EXPERTS."""
    index = tl.arange(0, EXPERTS)
    count = tl.load(counts + index)
    blocks = tl.cdiv(count, TOKENS)
    expert = tl.sum((tl.cumsum(blocks, axis=0) <= block).to(tl.int32), axis=0)
    before = index < expert
    start = tl.sum(tl.where(before, count, 0), axis=0)
    inside = (block - tl.sum(tl.where(before, blocks, 0), axis=0)) * TOKENS + tl.arange(0, TOKENS)
    valid = inside < tl.sum(tl.where(index == expert, count, 0), axis=0)
    return expert, tl.load(order + start + inside, mask=valid, other=0), valid


@triton.jit
def _multiply(
    words, before, scales, x, sums, columns, blocks,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr, LANES: tl.constexpr,
    GROUPS: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Return Σ_k (q − z)·s·x over all blocks, float32 [ROWS, TOKENS].

    Each group is computed as s·(Σ x·q − z·Σ x), because the codes q are exact in the activation's dtype. Codes of the
    grid are multiplied with their offset on them, which is subtracted with z. The words of the rows ``before`` are read
    if RING: their last plane, which this program reads for those rows too.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PLANE: tl.constexpr = TILE * LANES
    PARTS: tl.constexpr = GROUPS if GROUPS else 1
    FIELDS: tl.constexpr = 16 // PARTS
    TOGETHER: tl.constexpr = 4 if FIELDS > 4 else FIELDS  # of one product; more need more registers
    OFFSET: tl.constexpr = 0.0 if RING else offset(0, WIDTH, dtype, False)
    lane = tl.arange(0, TOGETHER * LANES)[:, None]
    x = x[None, :] + lane
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    total_x = tl.zeros((TOKENS,), tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        planes = load_words(words + block * (WIDTH * PLANE), None, WIDTH, PLANE)
        if RING:
            planes = (tl.load(before + (block * WIDTH + WIDTH - 1) * PLANE),) + planes  # noqa: RUF005
        start = block * (16 * LANES)
        for group in tl.static_range(PARTS):
            at = start + group * FIELDS * LANES
            part = tl.zeros((ROWS, TOKENS), tl.float32)
            for first in tl.static_range(0, FIELDS, TOGETHER):
                here = at + first * LANES
                inputs = tl.load(x + here) if EVEN else tl.load(x + here, mask=lane + here < columns, other=0.0)
                if MODE == "float32":
                    inputs = inputs.to(tl.float32)
                fields = ()
                for field in tl.static_range(group * FIELDS + first, group * FIELDS + first + TOGETHER):
                    if RING:
                        codes = ring_code_of(planes, field, WIDTH, dtype, MODE)
                    else:
                        codes = code_of(planes, field, WIDTH, dtype, False, MODE)
                    fields = fields + (codes,)  # type: ignore[assignment]  # noqa: RUF005
                codes = beside(fields, TOGETHER, (ROWS, TOGETHER * LANES))
                part = tl.dot(codes, inputs, part, input_precision="ieee")
            part_x = tl.zeros((TOKENS,), tl.float32)
            for index in tl.static_range(FIELDS * LANES // SUM):
                part_x += tl.load(sums + at // SUM + index)
            if GROUPS:
                scale, zero = scale_and_zero(tl.load(scales + (block * GROUPS + group) * TILE), MODE)
                if OFFSET > 0:
                    zero += OFFSET
                total += scale[:, None] * (part - zero[:, None] * part_x[None, :])
            else:
                total += part
                total_x += part_x
    if not GROUPS:
        scale, zero = scale_and_zero(tl.load(scales), MODE)
        if OFFSET > 0:
            zero += OFFSET
        total = scale[:, None] * (total - zero[:, None] * total_x[None, :])
    return total


@triton.jit
def _expert_tile(
    x, sums, words, scales, table, expert, tile, source, sources, valid, columns, tiles,
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
    row = tl.arange(0, ROWS)
    first = tile * (ROWS // TILE)
    # The last program may reach past the last tile: it reads that one again, and stores nothing of it.
    among = first + tl.minimum(row // TILE, tiles - 1 - first) if ROWS > TILE else first + row // TILE
    inner = row % TILE
    source = tl.where(valid, source, 0).to(tl.int64)
    inputs = x + source * columns
    input_sums = sums + source * (blocks * (16 * LANES // SUM))
    base = words + first_word.to(tl.int64) * (TILE * LANES)  # a product has a known alignment
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for CODING in tl.static_range(COUNT):
        if CODINGS & (1 << CODING):
            if coding == CODING:
                words_here, before = words_at(base, among, inner, blocks, width_of(CODING), LANES, GATED)
                groups = 1 if is_ring(CODING) or not GROUPS else blocks * GROUPS
                total = _multiply(
                    words_here, before,
                    scales + (first_scale.to(tl.int64) + among * groups) * TILE + inner % 8 * (TILE // 8) + inner // 8,
                    inputs + sources.to(tl.int64) * columns * copy_of(CODING, CODINGS), input_sums, columns, blocks,
                    ROWS, TOKENS, width_of(CODING), is_ring(CODING), LANES, 0 if is_ring(CODING) else GROUPS,
                    SUM, EVEN, STAGES, MODE,
                )  # fmt: skip
    return total


# Variants are compiled before graphs are captured, so no argument of a call may lead to another variant.
@triton.jit(do_not_specialize=["pairs", "blocks"], do_not_specialize_on_alignment=["weights"])
def many_tokens(
    x, sums, order, counts, weights, words, scales, table, biases, out, out_sums,
    pairs, blocks, rows, columns, sum_columns,
    SHARE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, CODINGS: tl.constexpr,
    LANES: tl.constexpr, GROUPS: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr,
    FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BETA: tl.constexpr,
    STAGES: tl.constexpr, MODE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Run one projection for any number of tokens, sorted by expert.

    Grid: (blocks of TOKENS pairs · tiles of ROWS). ``TOGETHER`` blocks go through the tiles side by side, so that
    weights and activations are reused from the L2 cache.

    Args:
        x: inputs [copies, pairs / SHARE, columns], a copy for each order of columns that CODINGS needs.
        sums: sums of x over SUM columns, float32 [pairs / SHARE, …].
        order: the pairs sorted by expert, [pairs].
        counts: pairs per expert [EXPERTS], with zeros behind the last expert.
        weights: routing weights [pairs], used by down only.
        words, scales, table: see :class:`vllm_moeq.kernels.triton.repack.Repacked`.
        biases: what is added to the outputs, float32 [E, rows] in the order of the rows; None for nothing.
        out: outputs [pairs, neurons] if there is a FUNCTION, else [pairs, rows]. If GATED, a neuron has two rows.
        out_sums: sums of ``out`` over 32 columns, float32 [pairs, sum_columns], written; None for none.
        blocks: an upper bound on the number of blocks; blocks past the end return.
    """
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    batch = program // (TOGETHER * tiles)
    height = tl.minimum(blocks - batch * TOGETHER, TOGETHER)
    block = batch * TOGETHER + program % (TOGETHER * tiles) % height
    tile = program % (TOGETHER * tiles) // height
    expert, pair, valid = _sorted_block(order, counts, block, TOKENS, EXPERTS)
    if expert >= EXPERTS:
        return
    total = _expert_tile(
        x, sums, words, scales, table, expert, tile, pair // SHARE, pairs // SHARE, valid, columns,
        tl.cdiv(rows, TILE), ROWS, TOKENS, CODINGS, LANES, GROUPS, SUM, EVEN, GATED, STAGES, MODE,
    )  # fmt: skip
    finish(
        total, biases, expert, out, out_sums, weights, pair, valid, tile, tile * 0, pairs, rows, sum_columns, ROWS,
        TOKENS, GATED, FUNCTION, ALPHA, LIMIT, BETA,
    )  # fmt: skip

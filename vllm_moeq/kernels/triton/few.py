"""The two launches of a layer for a few tokens: no sorting; several blocks of the inputs are taken at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.codings import COUNT, copy_of, is_ring, width_of
from vllm_moeq.kernels.triton.fields import code_of, differ, offset
from vllm_moeq.kernels.triton.records import ENTRIES, EXPERT, FIXED, PARTS
from vllm_moeq.kernels.triton.rings import ring_code_of
from vllm_moeq.kernels.triton.tile import TILE, beside, finish, load_words, scale_and_zero, words_at


@triton.jit
def _load_sums(pointers, mask, COUNT: tl.constexpr):
    """Return COUNT sums behind each other, two at a time where that is possible; zeros for what the mask leaves out."""
    found = ()
    if COUNT % 2 == 0:
        pairs = pointers.to(tl.pointer_type(tl.int64))
        for index in tl.static_range(COUNT // 2):
            both = tl.load(pairs + index) if mask is None else tl.load(pairs + index, mask=mask, other=0)
            found = found + (  # type: ignore[assignment]  # noqa: RUF005
                (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True),
                (both >> 32).to(tl.int32).to(tl.float32, bitcast=True),
            )
    else:
        for index in tl.static_range(COUNT):
            one = tl.load(pointers + index) if mask is None else tl.load(pointers + index, mask=mask, other=0.0)
            found = found + (one,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _load_scale_and_zero(pairs, mask, SHAPE: tl.constexpr, MODE: tl.constexpr):
    """Return scales and zeros of rows, float32 [SHAPE]; zeros for both where the mask leaves them out.

    ``pairs`` are pointers [..., 8, 8] in the order of memory. A thread needs every eighth row of a matrix product, and
    so loads its rows together.
    """
    both = tl.load(pairs) if mask is None else tl.load(pairs, mask=mask, other=0)
    return scale_and_zero(both.permute(0, 2, 1).reshape(SHAPE), MODE)


@triton.jit
def _multiply(
    words, before, scales, x, sums, columns, begin, end,
    SLICES: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    RING: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Return Σ_k (q − z)·s·x over the blocks [begin, end), float32 [ROWS, TOKENS].

    Each of the SLICES takes every SLICES-th block: a batch of small matrix products, a warp or more for each. FULL says
    that the last ones take as many as the first, so that no load needs a mask for that. A group is computed as
    s·(Σ x·q − z·Σ x), because the codes q are exact in the activation's dtype. Codes of the grid are multiplied with
    their offsets on them. A group's sum begins with minus what offsets and z add, so that nothing is subtracted after
    the product. With one scale per row (GROUPS = 0) z and an offset that all codes have are subtracted at the end. The
    words of the rows ``before`` are read if RING: their last plane, which this program reads for those rows too.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PLANE: tl.constexpr = TILE * LANES
    PER_BLOCK: tl.constexpr = GROUPS if GROUPS else 1
    FIELDS: tl.constexpr = 16 // PER_BLOCK
    SUMS: tl.constexpr = 16 * LANES // SUM
    DIFFER: tl.constexpr = not RING and differ(WIDTH, dtype, True)
    OFFSET: tl.constexpr = 0.0 if RING or DIFFER else offset(0, WIDTH, dtype, True)
    slices = tl.arange(0, SLICES)
    lane = (slices[:, None] * (16 * LANES) + tl.arange(0, FIELDS * LANES)[None, :])[:, :, None]
    x = x[None, None, :] + lane
    sums = sums[None, :] + slices[:, None] * SUMS
    words = words[None, :, :] + slices[:, None, None] * (WIDTH * PLANE)
    before = before[None, :, :] + (slices[:, None, None] * WIDTH + WIDTH - 1) * PLANE
    if GROUPS:
        scales += slices[:, None, None] * (GROUPS * TILE)
    total = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    total_x = tl.zeros((SLICES, TOKENS), tl.float32)
    for block in tl.range(begin, end, SLICES, num_stages=STAGES):
        inside = None if FULL else (block + slices < end)[:, None]
        deep = None if FULL else (block + slices < end)[:, None, None]
        planes = load_words(words + block * (WIDTH * PLANE), deep, WIDTH, PLANE)
        if RING:
            last = tl.load(before + block * (WIDTH * PLANE), mask=deep)
            planes = (last,) + planes  # noqa: RUF005
        for group in tl.static_range(PER_BLOCK):
            at = block * (16 * LANES) + group * FIELDS * LANES
            if FULL and EVEN:
                inputs = tl.load(x + at)
            else:
                there = lane + at < columns
                if not FULL:
                    there = deep if EVEN else deep & there
                inputs = tl.load(x + at, mask=there, other=0.0)
            if MODE == "float32":
                inputs = inputs.to(tl.float32)
            chunks = _load_sums(sums + block * SUMS + group * (SUMS // PER_BLOCK), inside, SUMS // PER_BLOCK)
            part_x, offset_x = tl.zeros((SLICES, TOKENS), tl.float32), tl.zeros((SLICES, TOKENS), tl.float32)
            for index in tl.static_range(SUMS // PER_BLOCK):
                part_x += chunks[index]
                if DIFFER:
                    offset_x += chunks[index] * offset(group * FIELDS + index * SUM // LANES, WIDTH, dtype, True)
            fields = ()
            for field in tl.static_range(FIELDS):
                if RING:
                    codes = ring_code_of(planes, group * FIELDS + field, WIDTH, dtype, MODE)
                else:
                    codes = code_of(planes, group * FIELDS + field, WIDTH, dtype, True, MODE)
                fields = fields + (codes,)  # type: ignore[assignment]  # noqa: RUF005
            codes = beside(fields, FIELDS, (SLICES, ROWS, FIELDS * LANES))
            part = tl.broadcast_to(-offset_x[:, None, :], (SLICES, ROWS, TOKENS))
            if GROUPS:
                scale, zero = _load_scale_and_zero(scales + (block * GROUPS + group) * TILE, deep, (SLICES, ROWS), MODE)
                if DIFFER:
                    part -= zero[:, :, None] * part_x[:, None, :]
                else:
                    part = -(zero + OFFSET)[:, :, None] * part_x[:, None, :]
            part = tl.dot(codes, inputs, part, input_precision="ieee")
            if GROUPS:
                total += scale[:, :, None] * part
            else:
                total += part
                total_x += part_x
    result = tl.sum(total, axis=0)
    if not GROUPS:
        scale, zero = _load_scale_and_zero(scales, None, (ROWS,), MODE)
        if OFFSET > 0:
            zero += OFFSET
        result = scale[:, None] * (result - zero[:, None] * tl.sum(total_x, axis=0)[None, :])
    return result


# Variants are compiled before graphs are captured, so no argument of a call may lead to another variant.
@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["weights"])
def few_tokens(
    x, sums, records, weights, words, scales, biases, out, out_sums, pairs, rows, columns, sum_columns,
    SIDE: tl.constexpr, SHARE: tl.constexpr, SLICES: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, CODINGS: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, SUM: tl.constexpr,
    EVEN: tl.constexpr, GATED: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BETA: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Run one projection for up to TOKENS tokens: an expert's first pair works for all its pairs.

    Grid: (tiles of ROWS, pairs, splits of the input dimension). The kernel branches on the coding once. Only those in
    ``CODINGS`` are compiled; its bit i stands for number i.

    Args:
        x: inputs [copies, pairs / SHARE, columns], a copy for each order of columns that CODINGS needs.
        sums: sums of x over SUM columns, float32 [pairs / SHARE, …].
        records: see :func:`vllm_moeq.kernels.triton.records.look_up`; SIDE is 0 for gate and up and 1 for down.
        weights: routing weights [pairs], used by down only.
        words, scales: see :class:`vllm_moeq.kernels.triton.repack.Repacked`.
        biases: what is added to the outputs, float32 [E, rows] in the order of the rows; None for nothing.
        out: outputs [pairs, neurons] if there is a FUNCTION, else [splits, pairs, rows]. If GATED, a neuron has two
            rows.
        out_sums: sums of ``out`` over 32 columns, float32 [pairs, sum_columns], written; None for none.
    """
    tl.static_assert(ROWS == TILE)
    tile, split = tl.program_id(0), tl.program_id(2)
    record = records + tl.program_id(1) * (FIXED + TOKENS)
    coding = tl.load(record + ENTRIES + 3 * SIDE)
    first_word, first_scale = tl.load(record + ENTRIES + 3 * SIDE + 1), tl.load(record + ENTRIES + 3 * SIDE + 2)
    expert, parts = tl.load(record + EXPERT), tl.load(record + PARTS)
    found = tl.load(record + FIXED + tl.arange(0, TOKENS))
    if SIDE == 0:
        parts = 1
    if (coding < 0) | (split >= parts):
        return
    valid = found >= 0
    pair = tl.maximum(found, 0)
    blocks = tl.cdiv(columns, 16 * LANES)
    begin, end = blocks * split // parts, blocks * (split + 1) // parts
    source = (pair // SHARE).to(tl.int64)
    inputs = x + source * columns
    input_sums = sums + source * (blocks * (16 * LANES // SUM))
    base = words + first_word.to(tl.int64) * (TILE * LANES)  # a product has a known alignment
    inner_scale = (tl.arange(0, 8)[:, None] * 8 + tl.arange(0, 8)[None, :])[None, :, :]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for CODING in tl.static_range(COUNT):
        if CODINGS & (1 << CODING):
            if coding == CODING:
                words_here, before = words_at(base, tile, tl.arange(0, ROWS), blocks, width_of(CODING), LANES, GATED)
                groups = 1 if is_ring(CODING) or not GROUPS else blocks * GROUPS
                total = _multiply(
                    words_here, before, scales + (first_scale.to(tl.int64) + tile * groups) * TILE + inner_scale,
                    inputs + (pairs // SHARE).to(tl.int64) * columns * copy_of(CODING, CODINGS), input_sums, columns,
                    begin, end, SLICES, FULL, ROWS, TOKENS, width_of(CODING), is_ring(CODING), LANES,
                    0 if is_ring(CODING) else GROUPS, SUM, EVEN, STAGES, MODE,
                )  # fmt: skip
    finish(
        total, biases, expert, out, out_sums, weights, pair, valid, tile, split, pairs, rows, sum_columns, ROWS,
        TOKENS, GATED, FUNCTION, ALPHA, LIMIT, BETA,
    )  # fmt: skip

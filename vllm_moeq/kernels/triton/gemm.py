"""The two launches of a layer: gate and up with the activation, and down with the routing weight."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.tile import add_bias, expert_tile, store_hidden, store_weighted


@triton.jit
def _matches(ids, pairs, pair, expert, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    """Return the pairs that use ``expert`` [TOKENS], which of them are valid, and whether ``pair`` is the first."""
    index = tl.arange(0, PAIRS)
    same = tl.load(ids + index, mask=index < pairs, other=-1) == expert
    rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
    slot = tl.arange(0, TOKENS)
    chosen = same[None, :] & (rank[None, :] == slot[:, None])
    found = tl.sum(tl.where(chosen, index[None, :], 0), axis=1)
    count = tl.sum(same.to(tl.int32), axis=0)
    first = tl.min(tl.where(same, index, PAIRS), axis=0)
    return found, slot < count, first == pair


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
def _finish(total, biases, expert, out, out_sums, weights, pair, valid, tile, split, pairs, rows, sum_columns,
            ROWS: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr, FUNCTION: tl.constexpr,
            ALPHA: tl.constexpr, LIMIT: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    total = add_bias(total, biases, expert, tile, rows, split == 0, ROWS)
    if FUNCTION >= 0:
        store_hidden(
            total, out, out_sums, pair, valid, tile, rows, sum_columns, ROWS, TOKENS, GATED, FUNCTION, ALPHA, LIMIT,
            BETA,
        )  # fmt: skip
    else:
        store_weighted(total, out + split.to(tl.int64) * pairs * rows, weights, pair, valid, tile, rows, ROWS)


# Variants are compiled before graphs are captured, so no argument of a call may lead to another variant.
@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["ids", "weights"])
def few_tokens(
    x, sums, ids, weights, words, scales, table, biases, splits, out, out_sums,
    pairs, rows, columns, sum_columns,
    SHARE: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, CODINGS: tl.constexpr,
    LANES: tl.constexpr, GROUPS: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr,
    FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BETA: tl.constexpr,
    STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Run one projection for up to TOKENS tokens without sorting: an expert's first pair works for all its pairs.

    Grid: (tiles of ROWS, pairs, splits of the input dimension).

    Args:
        x: inputs [copies, pairs / SHARE, columns], a copy for each order of columns that CODINGS needs.
        sums: sums of x over SUM columns, float32 [pairs / SHARE, …].
        ids: local expert indices [pairs]; negative ones are skipped.
        weights: routing weights [pairs], used by down only.
        words, scales, table: see :class:`vllm_moeq.kernels.triton.repack.Repacked`.
        biases: what is added to the outputs, float32 [E, rows] in the order of the rows; None for nothing.
        splits: the number of parts of each expert's input dimension, [E].
        out: outputs [pairs, neurons] if there is a FUNCTION, else [splits, pairs, rows]. If GATED, a neuron has two
            rows.
        out_sums: sums of ``out`` over 32 columns, float32 [pairs, sum_columns], written; None for none.
    """
    tile, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(ids + pair)
    if expert < 0:
        return
    parts = tl.load(splits + expert)
    if split >= parts:
        return
    found, valid, first = _matches(ids, pairs, pair, expert, TOKENS, PAIRS)
    if not first:
        return
    total = expert_tile(
        x, sums, words, scales, table, expert, tile, split, parts, found // SHARE, pairs // SHARE, valid, columns,
        tl.cdiv(rows, 64), ROWS, TOKENS, CODINGS, LANES, GROUPS, SUM, EVEN, GATED, STAGES, MODE,
    )  # fmt: skip
    _finish(
        total, biases, expert, out, out_sums, weights, found, valid, tile, split, pairs, rows, sum_columns, ROWS,
        TOKENS, GATED, FUNCTION, ALPHA, LIMIT, BETA,
    )  # fmt: skip


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
        order: the pairs sorted by expert, [pairs].
        counts: pairs per expert [EXPERTS], with zeros behind the last expert.
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
    total = expert_tile(
        x, sums, words, scales, table, expert, tile, 0, 1, pair // SHARE, pairs // SHARE, valid, columns,
        tl.cdiv(rows, 64), ROWS, TOKENS, CODINGS, LANES, GROUPS, SUM, EVEN, GATED, STAGES, MODE,
    )  # fmt: skip
    _finish(
        total, biases, expert, out, out_sums, weights, pair, valid, tile, tile * 0, pairs, rows, sum_columns, ROWS,
        TOKENS, GATED, FUNCTION, ALPHA, LIMIT, BETA,
    )  # fmt: skip

"""The small launches around the two large ones: sums of activations, sorting, and the reduction over experts."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.records import look_up


@triton.jit(do_not_specialize=["columns", "pairs"], do_not_specialize_on_alignment=["ids"])
def column_sums(
    x, sums, columns, sum_columns, SUM: tl.constexpr, CHUNKS: tl.constexpr,
    ids=None, pairs=0, up=None, down=None, splits=None, records=None,
    TOKENS: tl.constexpr = 0, PAIRS: tl.constexpr = 0, TOP_K: tl.constexpr = 0,
):  # fmt: skip
    """Store Σ x over SUM columns, float32, and the records of pairs. Grid: (rows, chunks / CHUNKS + TOP_K).

    The last TOP_K programs of a row look up the pairs of its token; see :func:`records.look_up` for their arguments.
    """
    parts = tl.cdiv(sum_columns, CHUNKS)
    if TOP_K:
        if tl.program_id(1) >= parts:
            pair = tl.program_id(0) * TOP_K + tl.program_id(1) - parts
            look_up(ids, pairs, pair, up, down, splits, records, TOKENS, PAIRS)
            return
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    column = chunk[:, None] * SUM + tl.arange(0, SUM)[None, :]
    values = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(sums + row * sum_columns + chunk, tl.sum(values, axis=1), mask=chunk < sum_columns)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["ids"])
def sort_pairs(ids, order, counts, pairs, CHUNK: tl.constexpr):
    """Sort pairs by expert, stably, without negative ids. Grid: (EXPERTS,); each program places one expert's pairs.

    Args:
        ids: local expert indices [pairs].
        order: the sorted pairs [pairs], written.
        counts: pairs per expert [EXPERTS], written.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, CHUNK)
    before = tl.zeros((CHUNK,), tl.int32)
    for start in tl.range(0, pairs, CHUNK):
        at = start + index
        found = tl.load(ids + at, mask=at < pairs, other=-1)
        before += ((found >= 0) & (found < expert)).to(tl.int32)
    place = tl.sum(before, axis=0)
    first = place
    for start in tl.range(0, pairs, CHUNK):
        at = start + index
        same = (tl.load(ids + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(same, axis=0) - 1, at, mask=same != 0)
        place += tl.sum(same, axis=0)
    tl.store(counts + expert, place - first)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["ids"])
def reduce_pairs(
    parts, ids, splits, out, pairs, columns, TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum over a token's experts and their splits. Grid: (tokens, columns / BLOCK).

    Args:
        parts: weighted outputs [SPLITS, pairs, columns]; unused splits and pairs with negative ids hold no values.
        ids: local expert indices [pairs].
        splits: each expert's number of splits [E]; not read if SPLITS is 1.
        out: sums [tokens, columns], written.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair)
        count = tl.load(splits + expert, mask=expert >= 0, other=0) if SPLITS > 1 else (expert >= 0).to(tl.int32)
        for split in tl.static_range(SPLITS):
            if split < count:
                at = (split * pairs + pair).to(tl.int64) * columns + column
                total += tl.load(parts + at, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * columns + column, total.to(out.dtype.element_ty), mask=column < columns)

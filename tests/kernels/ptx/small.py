"""The small launches around the two large ones, each by itself."""

from __future__ import annotations

import torch

from tests.kernels.ptx.cases import DTYPES
from tests.kernels.ptx.emulator.device import emulate
from tests.kernels.ptx.emulator.outcome import Outcome
from vllm_moeq.kernels.triton.around import column_sums, reduce_pairs, sort_pairs
from vllm_moeq.kernels.triton.layer import REDUCE_BLOCK, SORT_CHUNK


def sums(arch: str, dtype: str, size: int) -> Outcome:
    """Sum activations over groups; the padded columns count as zeros."""
    rows, columns, padded = 3, 320, 512
    x = torch.randn(rows, columns).to(DTYPES[dtype])
    count = padded // size
    chunks = min(16, count)
    with emulate(arch) as session:
        out = torch.empty((rows, count))
        column_sums[(rows, -(-count // chunks))](x, out, columns, count, SUM=size, CHUNKS=chunks)
    exact = torch.nn.functional.pad(x.double(), (0, padded - columns)).view(rows, count, size).sum(-1)
    return session.outcome(float((out.double() - exact).abs().max()))


def sort(arch: str, pairs: int, experts: int, skipped: float) -> Outcome:
    """Sort pairs by expert; the error is 1 if a place or a count is wrong."""
    ids = torch.randint(0, experts, (pairs,), dtype=torch.int32)
    ids[torch.rand(pairs) < skipped] = -1
    padded = 1 << (experts - 1).bit_length()
    with emulate(arch) as session:
        order, counts = torch.empty_like(ids), ids.new_empty(padded)
        sort_pairs[(padded,)](ids, order, counts, pairs, SORT_CHUNK)
    kept = torch.nonzero(ids >= 0).flatten()
    expected = kept[torch.argsort(ids[kept], stable=True)]
    right = torch.equal(order[: len(kept)].long(), expected)
    right &= torch.equal(counts.long(), torch.bincount(ids[kept], minlength=padded))
    return session.outcome(float(not right))


def reduction(arch: str, dtype: str, splits: int) -> Outcome:
    """Add up the experts of each token and their splits; the error is in units of the largest result."""
    tokens, top_k, columns = 3, 3, 1100
    parts = torch.randn(splits, tokens * top_k, columns).to(torch.float32 if splits > 1 else DTYPES[dtype])
    ids = torch.arange(tokens * top_k, dtype=torch.int32) % 4
    ids[::4] = -1
    each = torch.tensor([splits, 1, max(1, splits // 2), splits], dtype=torch.int32)
    with emulate(arch) as session:
        out = torch.empty((tokens, columns), dtype=DTYPES[dtype])
        grid = (tokens, -(-columns // REDUCE_BLOCK))
        reduce_pairs[grid](parts, ids, each, out, tokens * top_k, columns, top_k, splits, REDUCE_BLOCK)
    exact = torch.zeros(tokens, columns, dtype=torch.float64)
    for pair, expert in enumerate(ids.tolist()):
        if expert >= 0:
            exact[pair // top_k] += parts[: each[expert], pair].double().sum(0)
    return session.outcome(float((out.double() - exact).abs().max() / exact.abs().max()))

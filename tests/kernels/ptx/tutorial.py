# ruff: noqa: N803
"""Kernels like those of Triton's tutorials: the emulator is tested on them, since torch knows their results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tests.kernels.ptx.emulator.device import Change, Session, emulate
from tests.kernels.ptx.emulator.outcome import Outcome


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add two vectors."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute a softmax of each row."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf"))
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * columns + at, values / tl.sum(values, axis=0), mask=at < columns)


@triton.jit
def diverge(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum integers up in programs that loop a different number of times."""
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n, other=0)
    total = tl.cumsum(values, axis=0)
    for _ in range(program % 3):
        total = total * 2 + 1
    if program % 2 == 1:
        total += tl.max(values, axis=0)
    tl.store(out + at, total, mask=at < n)


@triton.jit
def matmul(  # type: ignore[no-untyped-def]
    a, b, c, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Multiply matrices [M, K] and [K, N], in a pipeline."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        at = start + k
        left = tl.load(a + rows[:, None] * K + at[None, :], mask=(rows < M)[:, None] & (at < K)[None, :], other=0.0)
        right = tl.load(
            b + at[:, None] * N + columns[None, :], mask=(columns < N)[None, :] & (at < K)[:, None], other=0.0
        )
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total, mask=(rows < M)[:, None] & (columns < N)[None, :])


def _outcome(found: torch.Tensor, expected: torch.Tensor, session: Session) -> Outcome:
    return session.outcome(float((found.double() - expected.double()).abs().max()))


def vectors(arch: str, change: Change | None = None) -> Outcome:
    """Run :func:`add`."""
    x, y = torch.randn(1000), torch.randn(1000)
    with emulate(arch, change) as session:
        out = torch.empty(1000)
        add[(4,)](x, y, out, 1000, BLOCK=256)
    return _outcome(out, x + y, session)


def twice(arch: str) -> Outcome:
    """Run :func:`add` on two pairs of vectors: nothing of the first launch may remain."""
    x = torch.randn(3, 1000)
    with emulate(arch) as session:
        for other in x[1:]:
            out = torch.empty(1000)
            add[(4,)](x[0].clone(), other.clone(), out, 1000, BLOCK=256)
    return _outcome(out, x[0] + x[2], session)


def rows(arch: str, change: Change | None = None) -> Outcome:
    """Run :func:`softmax`."""
    x = torch.randn(5, 300)
    with emulate(arch, change) as session:
        out = torch.empty_like(x)
        softmax[(5,)](x, out, 300, BLOCK=512)
    return _outcome(out, x.softmax(1), session)


def branches(arch: str) -> Outcome:
    """Run :func:`diverge`."""
    x = torch.randint(-50, 50, (700,), dtype=torch.int32)
    with emulate(arch) as session:
        out = torch.empty_like(x)
        diverge[(6,)](x, out, 700, BLOCK=128)
    expected = []
    for program, part in enumerate(x.split(128)):
        padded = torch.nn.functional.pad(part, (0, 128 - len(part)))
        total = padded.cumsum(0)
        for _ in range(program % 3):
            total = total * 2 + 1
        expected.append((total + padded.max() * (program % 2))[: len(part)])
    return _outcome(out, torch.cat(expected), session)


def matrices(arch: str, dtype: torch.dtype, warps: int = 4, change: Change | None = None) -> Outcome:
    """Run :func:`matmul`, with sizes that no tile divides; the error is in units of the largest result."""
    m, n, k = 100, 96, 160
    tile = (16 * warps, 64, 32)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (k, n)))
    with emulate(arch, change) as session:
        c = torch.empty((m, n))
        matmul[(-(-m // tile[0]), -(-n // tile[1]))](a, b, c, m, n, k, *tile, 3, num_warps=warps)
    exact = a.double() @ b.double()
    top = exact.abs().max()
    return _outcome(c / top, exact / top, session)

"""Sums, sort and reduction as compiled for GPUs."""

from __future__ import annotations

import pytest

from tests.kernels.ptx.cases import STEP
from tests.kernels.ptx.process import Call
from tests.tiers import thorough

pytestmark = pytest.mark.compiler

ARCHITECTURES = thorough(["sm_80", "sm_89", "sm_90", "sm_120"], ["sm_80", "sm_90", "sm_120"])
DTYPES = ["bf16", "fp16"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", thorough([32, 64, 128, 256], [32, 128]))
def test_sums(emulated: Call, arch: str, dtype: str, size: int) -> None:
    outcome = emulated("small.sums", arch, dtype, size)
    assert outcome.error < 1e-4
    assert not outcome.lines


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("pairs", "experts", "skipped"), [(1, 2, 0.0), (34, 5, 0.3), (2500, 128, 0.1), (40, 3, 1.0)])
def test_sort(emulated: Call, arch: str, pairs: int, experts: int, skipped: float) -> None:
    outcome = emulated("small.sort", arch, pairs, experts, skipped)
    assert outcome.error == 0
    assert not outcome.lines


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
def test_reduction(emulated: Call, arch: str, dtype: str, splits: int) -> None:
    outcome = emulated("small.reduction", arch, dtype, splits)
    assert outcome.error < STEP[dtype]
    assert not outcome.lines

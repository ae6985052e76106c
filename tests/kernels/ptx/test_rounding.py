"""The emulator's arithmetic rounds once: against exact fractions, and against torch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.kernels.ptx.emulator.rounding import Array, fused, narrow, two_sum, widen

DIGITS = {"bf16": 8, "f16": 11, "f32": 24}
LOWEST = {"bf16": -133, "f16": -24, "f32": -149}
"""The exponents of the smallest numbers."""


def to_nearest(exact: Fraction, kind: str) -> Fraction:
    """Round to the nearest value of a type, to an even one at a tie, as Python rounds integers."""
    exponent = LOWEST[kind]
    while abs(exact) >= Fraction(2) ** (exponent + DIGITS[kind]):
        exponent += 1
    unit = Fraction(2) ** exponent
    return round(exact / unit) * unit


def random_values(kind: str, seed: int) -> Array:
    """Numbers of either sign within a few powers of two of 1, so that sums cancel."""
    generator = np.random.default_rng(seed)
    values = np.ldexp(generator.integers(-(2**11), 2**11, 400), generator.integers(-14, -8, 400)).astype(np.float64)
    return (
        values.astype(np.float32).astype(np.float64)
        if kind == "f32"
        else widen(narrow(values, kind), kind).astype(np.float64)
    )


def back(values: Array, kind: str) -> Array:
    """Round to a type and return the values."""
    return values.astype(np.float32) if kind == "f32" else widen(narrow(values, kind), kind)


@pytest.mark.parametrize("kind", DIGITS)
def test_a_fused_multiply_add_rounds_once(kind: str) -> None:
    a, b, c = (random_values(kind, seed) for seed in range(3))
    found = back(fused(a, b, c), kind)
    for x, y, z, value in zip(*(v.tolist() for v in (a, b, c, found)), strict=True):
        assert Fraction(value) == to_nearest(Fraction(x) * Fraction(y) + Fraction(z), kind)


def test_a_sum_just_beside_a_tie_rounds_once() -> None:
    """In float64 both sums are the tie itself, which would go to the even neighbour."""
    tie = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    assert back(two_sum(tie, np.array([2.0**-70, -(2.0**-70)])), "bf16").tolist() == [1 + 2.0**-7, 1 + 2.0**-7]


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_agree_with_torch(kind: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (100000,), generator=torch.Generator().manual_seed(0)).int()
    x = bits.view(torch.float32)
    x = x[x.abs() < 65000]
    for values in (x.numpy(), x.double().numpy()):
        assert torch.equal(torch.from_numpy(narrow(values, kind).view(np.int16)), x.to(dtype).view(torch.int16))

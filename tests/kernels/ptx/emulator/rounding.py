"""Floating-point numbers as bits, rounded once.

A sum in float64 is first rounded to odd: then one more rounding, to a type with fewer digits, is the only one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

HALVES = ("bf16", "f16")
"""The types of 16 bits."""


def to_odd(total: Array, error: Array) -> Array:
    """Return total + error in float64, rounded to odd where it is not exact."""
    bits = total.view(np.int64)
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(total) & (total != 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)


def two_sum(a: Array, b: Array) -> Array:
    """Return a + b in float64, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return to_odd(total, np.where(np.isfinite(error), error, 0))


def fused(a: Array, b: Array, c: Array) -> Array:
    """Return a·b + c in float64, rounded to odd; the product must be exact in float64."""
    return two_sum(a * b, c)


def to_bf16(value: Array) -> Array:
    """Round float64 or float32 once to bfloat16, to nearest even, and return its bits."""
    if value.dtype != np.float32:
        near = value.astype(np.float32)
        back, bits = near.astype(np.float64), near.view(np.int32)
        inexact = (back != value) & ((bits & 1) == 0) & np.isfinite(near)
        away = np.abs(value) > np.abs(back)
        value = np.where(inexact, np.where(away, bits + 1, bits - 1), bits).astype(np.int32).view(np.float32)
    word = np.ascontiguousarray(value).view(np.uint32)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """Return bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def widen(bits: Array, kind: str) -> Array:
    """Return the bits of a float type as float32."""
    if kind == "f32":
        return bits.view(np.float32)
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def narrow(value: Array, kind: str) -> Array:
    """Round float64 or float32 once to a float type, and return its bits."""
    if kind == "f32":
        return value.astype(np.float32).view(np.uint32)
    return to_bf16(value) if kind == "bf16" else value.astype(np.float16).view(np.uint16)

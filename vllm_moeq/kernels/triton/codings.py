"""The table of codings: every kind of expert that the fused kernel knows, a scheme at a width.

A coding's index stands for it in the kernel: in the table of experts, and as a bit of the set that is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import triton

from vllm_moeq.format import GRID, TRELLIS_SCHEME, Scheme


@dataclass(frozen=True)
class Coding:
    """One row of the table.

    Attributes:
        scheme: the scheme of the expert's matrices.
        width: bits per weight, and planes of words per block.
        ring: whether a code also depends on the bits before its own, in rings through the rows of a tile. If so, a
            lane's fields are the columns of a tile; else fields are 16 columns apart.
    """

    scheme: Scheme
    width: int
    ring: bool


CODINGS = tuple(
    Coding(scheme, width, ring) for scheme, ring in ((GRID, False), (TRELLIS_SCHEME, True)) for width in scheme.widths
)
"""All codings; the index is the coding's number."""

COUNT = triton.language.constexpr(len(CODINGS))


def number_of(scheme: Scheme, width: int) -> int:
    """Return the index of a scheme at a width in :data:`CODINGS`."""
    return next(i for i, coding in enumerate(CODINGS) if (coding.scheme, coding.width) == (scheme, width))


def planes_in(codings: int) -> int:
    """Return the most planes of words that a coding of a set loads for a block; rings load one for the row before."""
    return max(coding.width + coding.ring for number, coding in enumerate(CODINGS) if codings >> number & 1)


def set_of(numbers: Iterable[int]) -> int:
    """Return a set of codings as the kernel takes it: bit i stands for coding i."""
    return sum(1 << number for number in set(numbers))


@triton.constexpr_function
def rings_in(codings: int) -> set[bool]:
    """Return which kinds of codings a set has: with rings, without, or both."""
    return {coding.ring for number, coding in enumerate(CODINGS) if codings >> number & 1}


@triton.constexpr_function
def width_of(number):
    """Return the width of a coding."""
    return CODINGS[number].width


@triton.constexpr_function
def is_ring(number):
    """Tell whether a coding has rings."""
    return CODINGS[number].ring


@triton.constexpr_function
def copy_of(number, codings):
    """Return which copy of the inputs a coding reads: each order of columns that a set of codings needs has one."""
    return sorted(rings_in(codings)).index(CODINGS[number].ring)

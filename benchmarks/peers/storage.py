"""Bits that a peer's format stores per expert weight, with scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """A format that stores codes, and numbers that a group of weights shares.

    Attributes:
        codes: bits of a code, with what its packing wastes.
        group: weights in a group.
        shared: bits of a group's scale and zero point.
    """

    codes: float
    group: int
    shared: float

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.codes + self.shared / self.group


GROUP = 128
"""Weights per scale, where a peer can choose."""

HALF = 16
"""Bits of a scale, and of a zero point that is no integer."""

MIXTRAL_ROW = 192
"""Inputs of a row of the shipped Mixtral's experts: two of three rows have 256, the others 128 (harmonic mean)."""


def ours(average: float) -> Storage:
    """Return our format: dense codes of any average, scale and zero point of 16 bits each."""
    return Storage(average, GROUP, 2 * HALF)


def trellis(average: float) -> Storage:
    """Return our format's trellis codes: a scale of 16 bits per row, here of the shipped Mixtral's rows."""
    return Storage(average, MIXTRAL_ROW, HALF)


def hqq(bits: int) -> Storage:
    """Return the hqq package's format: ten codes of three bits in a word of 32, a scale and a zero point of 16 bits."""
    return Storage(3.2 if bits == 3 else bits, GROUP, 2 * HALF)


def gptq(bits: int) -> Storage:
    """Return the format of GPTQModel and AutoRound: dense codes, a scale of 16 bits, a zero point as wide as a code.

    Both store zero points even where they are all in the middle. Without an order of columns the indices of groups
    need no bits.
    """
    return Storage(bits, GROUP, HALF + bits)


def ggml(block: int, size: int) -> Storage:
    """Return a type of llama.cpp: blocks of some weights that take some bytes, scales included."""
    return Storage(8 * size / block, block, 0)

"""Map values to the steps of a colour scale, and format numbers for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from planner.reporting.palette import LIGHT

STEPS = len(LIGHT.steps)
LOGARITHMIC_ABOVE = 30.0
"""Ratio of the largest to the smallest positive value above which a scale is logarithmic."""


@dataclass(frozen=True)
class Scale:
    """A scale with steps between the smallest and the largest value.

    Attributes:
        low: smallest value; on a logarithmic scale, the smallest positive value.
        high: largest value.
        logarithmic: whether steps are equal factors, not equal differences. The value 0 is then in the first step.
    """

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """Return the scale for one or more finite values."""
        low, high = min(values), max(values)
        positive = [value for value in values if value > 0]
        if low >= 0 and positive and high / min(positive) > LOGARITHMIC_ABOVE:
            return cls(min(positive), high, True)
        return cls(low, high, False)

    def step(self, value: float) -> int:
        """Return the step of a value, 0 to :data:`STEPS` − 1."""
        if value <= self.low or self.high == self.low:
            return 0
        low, high, at = map(self._even, (self.low, self.high, value))
        return min(STEPS - 1, int(STEPS * (at - low) / (high - low)))

    def _even(self, value: float) -> float:
        """Return a number that grows evenly along the scale; differences of such numbers do not overflow."""
        return math.log(value) if self.logarithmic else value / max(abs(self.low), abs(self.high))

    def bounds(self) -> list[float]:
        """Return the STEPS + 1 bounds of the steps; a single value if all values are equal."""
        if self.high == self.low:
            return [self.low]
        parts = [part / STEPS for part in range(1, STEPS)]
        if self.logarithmic:
            low, high = math.log(self.low), math.log(self.high)
            return [self.low, *(math.exp(low + (high - low) * part) for part in parts), self.high]
        return [self.low, *(self.low * (1 - part) + self.high * part for part in parts), self.high]


def number(value: float, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits and spaces between thousands; an exponent only if needed."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}·10{superscript(int(power))}"


def superscript(number: int) -> str:
    """Return an integer in superscript digits."""
    return str(number).translate(SUPERSCRIPTS)


def power_of_ten(largest: float) -> int:
    """Return the power of ten to factor out of numbers up to ``largest``; 0 if ``largest`` is at least 0.01.

    It is one that a float holds with all its digits: the smallest floats are smaller.
    """
    return max(sys.float_info.min_10_exp, math.floor(math.log10(largest))) if 0 < largest < 0.01 else 0


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

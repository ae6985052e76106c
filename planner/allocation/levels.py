"""The number of experts at each width (paper, section 3.3, step 2)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

Counts = Literal["paper", "official"]


def as_fraction(value: float | Fraction | str) -> Fraction:
    """Return the exact decimal that a user typed: 2.1 is 21/10, not the nearest binary float."""
    return value if isinstance(value, Fraction) else Fraction(str(value))


def level_counts(
    num_experts: int,
    bit_choices: Sequence[int],
    avg_bits: float | Fraction,
    counts: str = "paper",
) -> dict[int, int]:
    """Return the number of experts at each width; the average never exceeds ``avg_bits``.

    One width goes to all experts. With two widths, the fraction (b − b_l)/(b_h − b_l) of the experts gets b_h. Three
    widths, with Δ = b_h − b_l: above b_h − Δ/3, as many b_h as possible; from b_h − 2Δ/3 to b_h − Δ/3, the same as
    long as b_l is no more frequent than b_m; below, as few b_l as possible. More than three widths (our extension): the
    three-width rule over the lowest, the highest, and the inner width nearest to the average.

    Args:
        num_experts: number of experts, at least 1.
        bit_choices: distinct widths, any order.
        avg_bits: wanted average, between the smallest and the largest width.
        counts: ``paper``, or ``official`` for the counts of the authors' code. Below the middle width, that code gives
            b_m and b_h to equally many experts (published for 1.75 bits: half, a quarter, a quarter; other averages
            follow the same rule).

    Returns:
        Width → number of experts, for every width of ``bit_choices``, ascending.

    Raises:
        ValueError: no experts, no or repeated widths, or an average outside the widths.
    """
    if counts not in get_args(Counts):
        raise ValueError(f"counts must be one of {get_args(Counts)}, got {counts!r}")
    widths = sorted(bit_choices)
    average = as_fraction(avg_bits)
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if not widths or len(set(widths)) != len(widths):
        raise ValueError(f"bit_choices must be distinct widths, got {list(bit_choices)}")
    if not widths[0] <= average <= widths[-1]:
        raise ValueError(f"avg_bits must lie between {widths[0]} and {widths[-1]}, got {float(average)}")

    result = dict.fromkeys(widths, 0)
    if len(widths) == 1:
        result[widths[0]] = num_experts
        return result
    low, high = widths[0], widths[-1]
    # Bits left after every expert got the lowest width.
    spare = int(num_experts * (average - low))
    if len(widths) == 2:
        result[high] = min(num_experts, spare // (high - low))
        result[low] = num_experts - result[high]
        return result
    middle = min(widths[1:-1], key=lambda width: (abs(width - average), width))
    num_high, num_middle = _three_levels(num_experts, low, middle, high, spare, average, counts)
    result.update({low: num_experts - num_high - num_middle, middle: num_middle, high: num_high})
    return result


def _three_levels(
    num_experts: int, low: int, middle: int, high: int, spare: int, average: Fraction, counts: str
) -> tuple[int, int]:
    """Return (experts at the high width, experts at the middle width)."""
    up_high, up_middle = high - low, middle - low
    span = Fraction(up_high)

    def middle_for(num_high: int) -> int:
        return min(num_experts - num_high, (spare - num_high * up_high) // up_middle)

    feasible = range(min(num_experts, spare // up_high) + 1)
    if counts == "official" and average < middle:
        pairs = spare // (up_high + up_middle)
        return pairs, middle_for(pairs)
    if average > high - span / 3:
        best = max(feasible)
    elif average >= high - 2 * span / 3:
        balanced = [n for n in feasible if num_experts - n - middle_for(n) <= middle_for(n)]
        # With wide gaps between the widths no count may balance: then choose the fewest low ones.
        best = max(balanced) if balanced else max(feasible, key=lambda n: (n + middle_for(n), n))
    else:
        best = max(feasible, key=lambda n: (n + middle_for(n), n))
    return best, middle_for(best)

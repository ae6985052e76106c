from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.allocation import as_fraction, level_counts

EXAMPLES = settings(deadline=None, max_examples=300)
SUBSETS = st.sets(st.sampled_from([1, 2, 3, 4, 8]), min_size=1).map(sorted)
RULES = st.sampled_from(["paper", "official"])

TABLE = [
    ("1.75", (3, 4, 1), (106, 108, 42)),
    ("2.0", (2, 4, 2), (85, 86, 85)),
    ("2.125", (2, 3, 3), (74, 76, 106)),
    ("2.25", (2, 2, 4), (64, 64, 128)),
    ("2.375", (2, 1, 5), (80, 0, 176)),
    ("2.5", (2, 0, 6), (64, 0, 192)),
    ("2.625", (1, 1, 6), (48, 0, 208)),
    ("2.75", (1, 0, 7), (32, 0, 224)),
]
"""Average → (low, middle, high) for 8 and for 256 experts with 1, 2, 3 bits (the paper's rule)."""


@st.composite
def feasible(draw: st.DrawFn) -> tuple[int, list[int], Fraction]:
    """Return a number of experts, widths, and an average between the least and the largest."""
    widths = draw(SUBSETS)
    share = draw(st.fractions(0, 1, max_denominator=64))
    return draw(st.integers(1, 300)), widths, widths[0] + share * (widths[-1] - widths[0])


@pytest.mark.parametrize(("average", "of_8", "of_256"), TABLE)
@pytest.mark.parametrize("experts", [8, 256])
def test_the_published_counts(average: str, of_8: tuple[int, ...], of_256: tuple[int, ...], experts: int) -> None:
    counts = level_counts(experts, [1, 2, 3], Fraction(average))
    assert tuple(counts.values()) == (of_8 if experts == 8 else of_256)


@pytest.mark.parametrize(
    ("average", "expected"), [(Fraction(7, 3), (2, 4, 6)), (Fraction(5, 3), (5, 6, 1)), (Fraction(3, 2), (6, 6, 0))]
)
def test_both_boundaries_belong_to_the_middle_range(average: Fraction, expected: tuple[int, ...]) -> None:
    """Twelve experts: the upper rule would give (4, 0, 8) at 7/3, the lower one (4, 8, 0) at 5/3."""
    assert tuple(level_counts(12, [1, 2, 3], average).values()) == expected


@pytest.mark.parametrize(("experts", "expected"), [(8, (4, 2, 2)), (256, (128, 64, 64))])
def test_the_counts_of_the_authors_code(experts: int, expected: tuple[int, ...]) -> None:
    assert tuple(level_counts(experts, [1, 2, 3], 1.75, counts="official").values()) == expected


@pytest.mark.parametrize("average", ["2.0", "2.25", "2.5", "2.75"])
def test_both_rules_agree_from_the_middle_up(average: str) -> None:
    official = level_counts(8, [1, 2, 3], Fraction(average), counts="official")
    assert official == level_counts(8, [1, 2, 3], Fraction(average))


@EXAMPLES
@given(case=feasible(), rule=RULES)
def test_counts_sum_to_the_experts(case: tuple[int, list[int], Fraction], rule: str) -> None:
    experts, widths, average = case
    assert sum(level_counts(experts, widths, average, rule).values()) == experts


@EXAMPLES
@given(case=feasible(), rule=RULES)
def test_no_count_is_negative(case: tuple[int, list[int], Fraction], rule: str) -> None:
    experts, widths, average = case
    assert min(level_counts(experts, widths, average, rule).values()) >= 0


@EXAMPLES
@given(case=feasible(), rule=RULES)
def test_the_average_is_never_exceeded(case: tuple[int, list[int], Fraction], rule: str) -> None:
    experts, widths, average = case
    counts = level_counts(experts, widths, average, rule)
    assert sum(bits * count for bits, count in counts.items()) <= average * experts


@EXAMPLES
@given(experts=st.integers(1, 300), share=st.fractions(0, 1, max_denominator=64))
def test_consecutive_widths_spend_every_whole_bit(experts: int, share: Fraction) -> None:
    average = 1 + 2 * share
    counts = level_counts(experts, [1, 2, 3], average)
    assert sum(bits * count for bits, count in counts.items()) == int(average * experts)


@EXAMPLES
@given(experts=st.integers(1, 300), share=st.fractions(0, 1, max_denominator=64), low=st.sampled_from([1, 2, 4]))
def test_two_widths_give_the_high_one_its_share(experts: int, share: Fraction, low: int) -> None:
    assert level_counts(experts, [low, 8], low + share * (8 - low))[8] == int(share * experts)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_one_width_is_everybodys(bits: int) -> None:
    assert level_counts(7, [bits], bits) == {bits: 7}


@pytest.mark.parametrize(("average", "width"), [(1, 1), (3, 3)])
def test_the_ends_give_everybody_one_width(average: int, width: int) -> None:
    assert level_counts(8, [1, 2, 3], average)[width] == 8


def test_every_choice_is_a_key_in_ascending_order() -> None:
    assert list(level_counts(8, [8, 1, 4, 2, 3], 2.5)) == [1, 2, 3, 4, 8]


def test_the_order_of_the_choices_does_not_matter() -> None:
    assert level_counts(8, [3, 1, 2], 2.25) == level_counts(8, [1, 2, 3], 2.25)


def test_a_typed_decimal_is_exact() -> None:
    """0.3 of 10 experts is 3, although the float 1.3 is below 13/10 of them."""
    assert level_counts(10, [1, 2], 1.3) == {1: 7, 2: 3}


@pytest.mark.parametrize(("value", "expected"), [(2.1, (21, 10)), ("2.125", (17, 8)), (Fraction(7, 3), (7, 3))])
def test_as_fraction_is_what_was_typed(value: float | str | Fraction, expected: tuple[int, int]) -> None:
    assert as_fraction(value) == Fraction(*expected)


@pytest.mark.parametrize("average", [0.99, 3.01, 0, -1, 9])
def test_averages_outside_the_widths_are_refused(average: float) -> None:
    with pytest.raises(ValueError, match="avg_bits must lie between 1 and 3"):
        level_counts(8, [1, 2, 3], average)


@pytest.mark.parametrize("average", [float("nan"), float("inf"), float("-inf")])
def test_averages_that_are_not_finite_are_refused(average: float) -> None:
    with pytest.raises(ValueError, match=r"nan|inf"):
        level_counts(8, [1, 2, 3], average)


@pytest.mark.parametrize("widths", [[], [2, 2], [1, 2, 1]])
def test_missing_or_repeated_widths_are_refused(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        level_counts(8, widths, 2)


@pytest.mark.parametrize("experts", [0, -1])
def test_no_experts_are_refused(experts: int) -> None:
    with pytest.raises(ValueError, match="num_experts"):
        level_counts(experts, [1, 2], 1.5)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="counts"):
        level_counts(8, [1, 2], 1.5, counts="mine")

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.allocation import rank_experts

EXAMPLES = settings(deadline=None, max_examples=200)
PROMOTIONS = ("official", "stable")
norm = st.floats(0.1, 10, allow_nan=False)
variance = st.floats(0.001, 100, allow_nan=False)
experts = st.lists(st.tuples(norm, variance), min_size=1, max_size=24)
zetas = st.sampled_from([1.0, 1.5, 3.0, 10.0])


def straightforward(norms: list[float], variances: list[float], zeta: float, promotion: str) -> list[int]:
    """The rule in words, on a Python list."""
    order = sorted(range(len(norms)), key=lambda expert: (norms[expert], expert))
    visits = list(reversed(order)) if promotion == "official" else list(order)
    for expert in visits:
        for position, other in enumerate(order):
            if zeta * variances[other] < variances[expert]:
                if order.index(expert) > position:
                    order.remove(expert)
                    order.insert(position, expert)
                break
    return order


@EXAMPLES
@given(scores=experts, zeta=zetas, promotion=st.sampled_from(PROMOTIONS))
def test_equals_the_rule_in_words(scores: list[tuple[float, float]], zeta: float, promotion: str) -> None:
    norms, variances = [n for n, _ in scores], [v for _, v in scores]
    assert rank_experts(norms, variances, zeta, promotion) == straightforward(norms, variances, zeta, promotion)


@EXAMPLES
@given(scores=experts, zeta=zetas, promotion=st.sampled_from(PROMOTIONS))
def test_is_a_permutation(scores: list[tuple[float, float]], zeta: float, promotion: str) -> None:
    order = rank_experts([n for n, _ in scores], [v for _, v in scores], zeta, promotion)
    assert sorted(order) == list(range(len(scores)))


@EXAMPLES
@given(scores=experts, zeta=zetas, promotion=st.sampled_from(PROMOTIONS))
def test_leaves_no_expert_behind_one_it_should_overtake(
    scores: list[tuple[float, float]], zeta: float, promotion: str
) -> None:
    variances = [v for _, v in scores]
    order = rank_experts([n for n, _ in scores], variances, zeta, promotion)
    violations = [
        (first, second)
        for i, first in enumerate(order)
        for second in order[i + 1 :]
        if variances[second] > zeta * variances[first]
    ]
    assert violations == []


@EXAMPLES
@given(
    norms=st.lists(norm, min_size=12, max_size=12),
    variances=st.lists(variance, min_size=12, max_size=12, unique=True),
    promotion=st.sampled_from(PROMOTIONS),
)
def test_zeta_one_sorts_by_variance(norms: list[float], variances: list[float], promotion: str) -> None:
    expected = sorted(range(12), key=lambda expert: -variances[expert])
    assert rank_experts(norms, variances, 1.0, promotion) == expected


def test_similar_variances_leave_the_router_order() -> None:
    assert rank_experts([3.0, 1.0, 2.0], [1.0, 2.9, 2.0]) == [1, 2, 0]


def test_equal_norms_keep_the_experts_order() -> None:
    assert rank_experts([1.0] * 5, [1.0] * 5) == [0, 1, 2, 3, 4]


def test_exactly_zeta_times_is_not_enough() -> None:
    assert rank_experts([1.0, 2.0], [1.0, 3.0], zeta=3.0) == [0, 1]


def test_more_than_zeta_times_moves_before_the_first_such_expert() -> None:
    assert rank_experts([1.0, 2.0, 3.0, 4.0], [9.0, 1.0, 1.0, 4.0], zeta=3.0) == [0, 3, 1, 2]


def test_norms_may_be_negative_changes() -> None:
    assert rank_experts([0.5, -0.5, 0.0], [1.0, 1.0, 1.0]) == [1, 2, 0]


@pytest.mark.parametrize(("promotion", "expected"), [("official", [2, 1, 0]), ("stable", [1, 2, 0])])
def test_the_visiting_order_decides_among_the_promoted(promotion: str, expected: list[int]) -> None:
    """[a, x, y] with variances 1, 5, 4: y, x, a from the bottom up and x, y, a from the top down."""
    assert rank_experts([1.0, 2.0, 3.0], [1.0, 5.0, 4.0], 3.0, promotion) == expected


def test_no_experts_is_an_empty_order() -> None:
    assert rank_experts([], []) == []


@pytest.mark.parametrize(("norms", "variances"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([], [1.0])])
def test_lengths_must_agree(norms: list[float], variances: list[float]) -> None:
    with pytest.raises(ValueError, match="as many variances as norms"):
        rank_experts(norms, variances)


@pytest.mark.parametrize("zeta", [0.99, 0.0, -3.0, float("nan")])
def test_zeta_below_one_is_refused(zeta: float) -> None:
    with pytest.raises(ValueError, match="zeta"):
        rank_experts([1.0], [1.0], zeta)


@pytest.mark.parametrize("promotion", ["", "Official", "top-down"])
def test_unknown_promotions_are_refused(promotion: str) -> None:
    with pytest.raises(ValueError, match="promotion"):
        rank_experts([1.0], [1.0], 3.0, promotion)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["norm", "variance"])
def test_scores_that_are_not_finite_are_refused(bad: float, which: str) -> None:
    norms, variances = ([1.0, bad], [1.0, 1.0]) if which == "norm" else ([1.0, 1.0], [1.0, bad])
    with pytest.raises(ValueError, match="finite"):
        rank_experts(norms, variances)

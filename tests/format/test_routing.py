"""The rule that skips experts, against the same rule in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_moeq.format import drop_weak

EXAMPLES = settings(deadline=None, max_examples=100)

Token = list[tuple[int, float]]

WEIGHTS = st.one_of(st.just(0.0), st.floats(2.0**-20, 1.0))
SLOTS = st.tuples(st.integers(-1, 7), WEIGHTS)
THRESHOLDS = st.one_of(st.just(0.0), st.floats(2.0**-20, 1.0))
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


@st.composite
def tokens(draw: st.DrawFn) -> list[Token]:
    """Up to five tokens with one to eight slots each; an id of −1 is an empty slot."""
    size = draw(st.integers(1, 8))
    return draw(st.lists(st.lists(SLOTS, min_size=size, max_size=size), min_size=1, max_size=5))


def tensors(rows: list[Token], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[expert for expert, _ in row] for row in rows], dtype=torch.int32)
    return ids, torch.tensor([[weight for _, weight in row] for row in rows], dtype=torch.float64).to(dtype)


def reference(row: Token, threshold: float) -> Token:
    """What is left of one token's experts."""
    present = [weight for expert, weight in row if expert >= 0]
    limit = threshold * max(present, default=0.0)
    factor = math.fsum(present) / (math.fsum(weight for weight in present if weight >= limit) or 1.0)
    result: Token = []
    for expert, weight in row:
        if expert < 0 or not any(other < limit for other in present):
            result.append((expert, weight))
        else:
            result.append((expert, weight * factor) if weight >= limit else (-1, 0.0))
    return result


def assert_agrees(rows: list[Token], threshold: float, dtype: torch.dtype) -> None:
    ids, weights = drop_weak(*tensors(rows, dtype), threshold)
    expected_ids, expected = tensors([reference(row, threshold) for row in rows])
    assert ids.dtype == torch.int32
    assert weights.dtype == dtype
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected, rtol=PRECISION[dtype], atol=0)


@EXAMPLES
@given(tokens(), THRESHOLDS)
def test_agrees_with_plain_python(rows: list[Token], threshold: float) -> None:
    assert_agrees(rows, threshold, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EXAMPLES
@given(rows=tokens(), threshold=THRESHOLDS)
def test_other_dtypes_agree_away_from_the_threshold(dtype: torch.dtype, rows: list[Token], threshold: float) -> None:
    ids, weights = tensors(rows, dtype)
    assume(bool(((weights == 0) | (weights >= 2.0**-14)).all()))  # below, float16 has few digits
    rounded = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), weights.tolist(), strict=True)]
    for row in rounded:
        limit = threshold * max((weight for expert, weight in row if expert >= 0), default=0.0)
        assume(not any(weight != 0 and math.isclose(weight, limit, rel_tol=1e-5) for _, weight in row))
    assert_agrees(rounded, threshold, dtype)


@EXAMPLES
@given(tokens(), THRESHOLDS)
def test_the_largest_is_kept_and_sums_are_preserved(rows: list[Token], threshold: float) -> None:
    ids, weights = tensors(rows)
    new_ids, new_weights = drop_weak(ids, weights, threshold)
    before = torch.where(ids >= 0, weights, 0.0)
    after = torch.where(new_ids >= 0, new_weights, 0.0)
    torch.testing.assert_close(after.sum(dim=1), before.sum(dim=1), rtol=1e-12, atol=0)
    largest = (ids >= 0) & (before == before.amax(dim=1, keepdim=True))
    assert torch.equal(new_ids[largest], ids[largest])
    assert bool((new_weights[largest] >= weights[largest]).all())


@EXAMPLES
@given(tokens())
def test_a_threshold_of_zero_changes_nothing(rows: list[Token]) -> None:
    ids, weights = tensors(rows)
    new_ids, new_weights = drop_weak(ids, weights, 0.0)
    assert torch.equal(new_ids, ids)
    assert torch.equal(new_weights, weights)


@EXAMPLES
@given(tokens(), THRESHOLDS)
def test_the_input_is_not_modified(rows: list[Token], threshold: float) -> None:
    ids, weights = tensors(rows)
    drop_weak(ids, weights, threshold)
    expected_ids, expected = tensors(rows)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected)


@EXAMPLES
@given(st.floats(0.5, 1.0), THRESHOLDS)
def test_of_two_experts_the_second_goes_below_the_threshold(first: float, threshold: float) -> None:
    """MC-MoE's rule: with p1 + p2 = 1, the second is dropped if p2 < threshold · p1."""
    second = 1.0 - first
    ids, weights = drop_weak(torch.tensor([[4, 2]]), torch.tensor([[first, second]], dtype=torch.float64), threshold)
    if second < threshold * first:
        assert ids.tolist() == [[4, -1]]
        assert weights.tolist() == [[pytest.approx(1.0), 0.0]]
    else:
        assert ids.tolist() == [[4, 2]]
        assert weights.tolist() == [[first, second]]


def test_empty_slots_do_not_count() -> None:
    """Whatever an empty slot's weight is: padding may hold anything."""
    weights = torch.tensor([[0.5, 0.4, 0.1, 9.0], [0.5, 0.4, 0.1, math.nan]])
    ids, result = drop_weak(torch.tensor([[0, 1, 2, -1]] * 2), weights, 0.5)
    assert ids.tolist() == [[0, 1, -1, -1]] * 2
    torch.testing.assert_close(result[:, :3], torch.tensor([[0.5 / 0.9, 0.4 / 0.9, 0.0]] * 2))


@pytest.mark.parametrize("ids", [[[-1, -1]], [[3, 5]]])
def test_tokens_without_weights_stay_as_they_are(ids: list[list[int]]) -> None:
    result, weights = drop_weak(torch.tensor(ids), torch.zeros(1, 2), 1.0)
    assert result.tolist() == ids
    assert weights.tolist() == [[0.0, 0.0]]


def test_no_tokens() -> None:
    ids, weights = drop_weak(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 0.5)
    assert ids.shape == weights.shape == (0, 2)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_other_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        drop_weak(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), threshold)


def test_one_graph_for_any_number_of_tokens() -> None:
    """torch.compile takes it whole, so nothing in it waits for a value."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(drop_weak, fullgraph=True, dynamic=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    for number in (2, 3, 50):
        weights = torch.rand(number, 4, generator=generator)
        ids = torch.randint(-1, 8, (number, 4), generator=generator)
        for ours, plain in zip(compiled(ids, weights, 0.5), drop_weak(ids, weights, 0.5), strict=True):
            assert torch.equal(ours, plain)
    assert graphs == 1

"""No kernel touches memory outside its arguments, whatever shape a layer has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from tests.kernels.bounds import bounded
from tests.kernels.layers import exact, random_layer, random_routing
from vllm_moeq.format import BIT_WIDTHS
from vllm_moeq.kernels import make_layer
from vllm_moeq.kernels.triton.around import column_sums
from vllm_moeq.kernels.triton.layer import TritonLayer
from vllm_moeq.kernels.triton.schedule import FEW, FEW_TOKENS, MANY, SPLIT_CHOICES, Schedule

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")]


@pytest.mark.parametrize(
    ("inputs", "sums", "what"),
    [
        (1, 4, "read of 4 bytes at byte 256 near x, which has 256"),
        (2, 2, "write of 4 bytes at byte 8 near sums, which has 8"),
    ],
)
def test_an_access_outside_is_seen(inputs: int, sums: int, what: str) -> None:
    x = torch.zeros(1024)[128 : 128 + 64 * inputs]
    with bounded(), pytest.raises(InterpreterError, match=what):
        column_sums[(2, 1)](x, torch.zeros(sums), 64, 2, SUM=32, CHUNKS=2)


# Without shrinking: a failure names the launch's argument, and another example takes a second.
FEW_EXAMPLES = settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])

Shape = tuple[int, int, int, int]
"""Hidden and intermediate size, group size, and this rank's offset within a group."""


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    hidden, intermediate = (32 * draw(st.sampled_from([1, 2, 3, 5, 9])) for _ in range(2))
    group = draw(st.sampled_from([32, 64, 96, 128, 160, -1]))
    return hidden, intermediate, group, 32 * draw(st.integers(0, group // 32 - 1)) if group > 0 else 0


def agrees(bits: list[int], shape: Shape, tokens: int, splits: int) -> None:
    packed = random_layer(bits, *shape)
    weights, ids = random_routing(tokens, len(bits), 1)
    x = torch.randn((tokens, packed.hidden), generator=torch.Generator().manual_seed(0)).half()
    layer = make_layer(packed, x.dtype, "triton")
    assert isinstance(layer, TritonLayer)
    with pytest.MonkeyPatch.context() as patch, bounded() as launches:
        patch.setattr(TritonLayer, "_splits", lambda *_: splits)
        found = layer(x, weights, ids)
    assert launches[-1] == "reduce_pairs"
    expected = exact(packed, x, weights, ids)
    assert float((found.double() - expected).norm() / expected.norm()) < 2e-3


@FEW_EXAMPLES
@given(
    shapes(),
    st.lists(st.sampled_from(BIT_WIDTHS), min_size=2, max_size=3),
    st.sampled_from([schedule.tokens for schedule in FEW]),
    st.sampled_from(SPLIT_CHOICES),
)
def test_few_tokens(shape: Shape, bits: list[int], tokens: int, splits: int) -> None:
    agrees(bits, shape, tokens, splits)


@FEW_EXAMPLES
@given(shapes(), st.lists(st.sampled_from(BIT_WIDTHS), min_size=2, max_size=2), st.sampled_from(MANY))
@example((96, 96, 32, 0), [3, 2], MANY[-1]).via("an odd number of tiles of 64 rows in both projections")
def test_many_tokens(shape: Shape, bits: list[int], schedule: Schedule) -> None:
    """An expert's share of the tokens is the most that the schedule is meant for."""
    agrees(bits, shape, max(2 * schedule.tokens, FEW_TOKENS + 1), 1)

"""Zero points that are codes, for formats that store them as such."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.quantization.quantizers import QUANTIZERS, quantize_rtn, quantizer_for
from vllm_moeq.format import ZERO

EXAMPLES = settings(deadline=None, max_examples=60)
NAMES = sorted(name for name, row in QUANTIZERS.items() if "integer" in row.rounds)


def weights(shift: float, size: float, seed: int) -> torch.Tensor:
    return (torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)) * 0.02 + shift) * size


@EXAMPLES
@given(
    name=st.sampled_from(NAMES),
    bits=st.sampled_from([2, 3, 4, 8]),
    shift=st.sampled_from([0.0, 0.01, -0.05, 1.0, -1.0]),
    size=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    group_size=st.sampled_from([32, 64, -1]),
    seed=st.integers(0, 1000),
)
def test_they_are_codes(name: str, bits: int, shift: float, size: float, group_size: int, seed: int) -> None:
    result = quantizer_for(bits, name, "sign", "integer")(weights(shift, size, seed), bits, group_size)
    zeros = result.tensors()[ZERO].float()
    assert torch.equal(zeros, zeros.round())
    assert float(zeros.min()) >= 0
    assert float(zeros.max()) < 2**bits
    assert not bool(torch.signbit(zeros).any())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_groups_are_exact(name: str, bits: int, value: float) -> None:
    found = quantizer_for(bits, name, "sign", "integer")(torch.full((4, 64), value), bits, 32).dequantize()
    torch.testing.assert_close(found, torch.full((4, 64), value), rtol=2**-10, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_they_cost_little(name: str, bits: int) -> None:
    def error(zero_points: str) -> float:
        exact = weights(0.0, 1.0, 0)
        result = quantizer_for(bits, name, "sign", zero_points)(exact, bits, 64)  # type: ignore[arg-type]
        return float((result.dequantize() - exact).norm())

    assert error("integer") <= 1.15 * error("float")


def test_groups_around_zero_are_rtn_as_ever() -> None:
    for bits in (2, 3, 4, 8):
        usual, whole = quantize_rtn(weights(0, 1, 0), bits, 64), quantize_rtn(weights(0, 1, 0), bits, 64, "integer")
        assert torch.equal(usual.codes, whole.codes)
        assert torch.equal(usual.zeros, whole.zeros)


def test_one_bit_keeps_float_zero_points() -> None:
    assert quantizer_for(1, "hqq", "sign", "integer") is quantizer_for(1, "hqq", "sign")

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hqq.core.quantize import Quantizer as ReferenceHqq
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.quantization.quantizers import (
    QUANTIZERS,
    Quantized,
    QuantizerRow,
    linear_group_size,
    quantize_hqq,
    quantize_linear,
    quantize_rtn,
    quantize_sign,
    quantizer_for,
)
from planner.quantization.quantizers.table import check_widths, quantizer_name
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import BIT_WIDTHS, GRID, SCHEMES, CheckpointError, Linear, TensorLayout, UsageError

EXAMPLES = settings(deadline=None, max_examples=40)
CASES = [("sign", 1), *((name, bits) for name in ("hqq", "rtn") for bits in BIT_WIDTHS)]
SCALED = [case for case in CASES if case[1] > 1 or case[0] == "sign"]
"""Cases whose error is proportional to the weights: HQQ's norm is not, and shows it at one bit."""
FUNCTIONS: dict[str, Callable[[torch.Tensor, int, int], Quantized]] = {
    "sign": quantize_sign,
    "hqq": quantize_hqq,
    "rtn": quantize_rtn,
}

NARROW = {
    "constant": torch.full((4, 64), 0.7),
    "negative constant": torch.full((4, 64), -0.7),
    "zero": torch.zeros(4, 64),
    "constant and noise": 0.7 + 1e-4 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0)),
    "constant and less noise": -3.0 + 1e-7 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0)),
    "a tenth of a constant": 1 - 0.1 * torch.rand(4, 64, generator=torch.Generator().manual_seed(0)),
}
"""Matrices whose groups span at most a tenth of their magnitude."""


def gaussian(rows: int = 32, columns: int = 256, size: float = 0.02, seed: int = 0) -> torch.Tensor:
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("seed", [0, 1])
def test_hqq_is_as_good_as_the_reference(bits: int, group_size: int, seed: int) -> None:
    weight = gaussian(seed=seed)
    packed, meta = ReferenceHqq.quantize(
        weight.clone(), nbits=bits, group_size=group_size, axis=1, optimize=True, round_zero=bits == 4,
        device="cpu", compute_dtype=torch.float32,
    )  # fmt: skip
    reference = float((ReferenceHqq.dequantize(packed, meta).reshape(weight.shape) - weight).abs().mean())
    ours = float((quantize_hqq(weight, bits, group_size).dequantize() - weight).abs().mean())
    assert ours == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_is_better_than_rtn(bits: int) -> None:
    weight = gaussian()
    error = {f: float((f(weight, bits, 64).dequantize() - weight).abs().mean()) for f in (quantize_hqq, quantize_rtn)}
    assert error[quantize_hqq] < error[quantize_rtn]


@EXAMPLES
@given(
    bits=st.sampled_from(BIT_WIDTHS),
    shift=st.sampled_from([0.0, 0.3, -1.0, 3.0]),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_rtn_errs_by_little_more_than_half_a_step(bits: int, shift: float, size: float, seed: int) -> None:
    """A rounded zero costs the ends of the range up to half a step more; stored numbers round, too."""
    weight = (torch.rand(8, 128, generator=torch.Generator().manual_seed(seed)) + shift) * size
    groups = weight.reshape(8, 2, 64)
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    result = quantize_rtn(weight, bits, 64)
    resolution = 2**-10 if result.scales.dtype == torch.float16 else 2**-7
    error = (result.dequantize() - weight).abs().reshape(8, 2, 64).amax(-1)
    assert bool((error <= 1.001 * step + groups.abs().amax(-1) * resolution).all())


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_rtn_errs_by_half_a_step_on_average_groups(bits: int) -> None:
    weight = gaussian(seed=3)
    result = quantize_rtn(weight, bits, 64)
    step = result.scales.float().repeat_interleave(64, dim=1)
    inside = (result.codes > 0) & (result.codes < 2**bits - 1)
    assert bool(((result.dequantize() - weight).abs() <= 0.5001 * step)[inside].all())


@EXAMPLES
@given(seed=st.integers(0, 1000), group_size=st.sampled_from([32, 64, -1]))
def test_sign_is_the_mean_magnitude_with_the_weights_sign(seed: int, group_size: int) -> None:
    weight = gaussian(4, 128, seed=seed)
    groups = weight.reshape(4, -1, 128 if group_size < 0 else group_size)
    expected = (groups.abs().mean(-1, keepdim=True) * groups.sign()).reshape(4, 128)
    torch.testing.assert_close(quantize_sign(weight, 1, group_size).dequantize(), expected, rtol=1e-3, atol=0)


def test_the_sign_of_zero_is_plus() -> None:
    weight = gaussian(2, 64)
    weight[:, ::3] = 0
    weight[:, 3] = -0.0
    assert bool((quantize_sign(weight, 1, 32).dequantize()[:, ::3] > 0).all())


def test_tiny_weights_keep_their_sign_beside_large_ones() -> None:
    weight = gaussian(2, 64)
    weight[:, 5], weight[:, 6] = 1e-12, -1e-12
    found = quantize_sign(weight, 1, 64).dequantize()
    assert (found[:, 5:7] > 0).tolist() == [[True, False]] * 2


def test_sign_is_stored_as_scale_and_a_zero_of_one_half() -> None:
    weight = gaussian(2, 64)
    result = quantize_sign(weight, 1, 64)
    assert result.zeros.tolist() == [[0.5], [0.5]]
    torch.testing.assert_close(result.scales.float(), 2 * weight.abs().mean(1, keepdim=True), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sign_has_one_bit(bits: int) -> None:
    with pytest.raises(ValueError, match="1 bit"):
        quantize_sign(gaussian(), bits, 64)


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("group_size", [32, -1])
def test_narrow_groups_stay_close(name: str, bits: int, kind: str, group_size: int) -> None:
    weight = NARROW[kind]
    error = (FUNCTIONS[name](weight, bits, group_size).dequantize() - weight).abs().max()
    spread = weight.amax() - weight.amin()
    # The sign has no zero point to spend: it is off by as much as the spread.
    allowed = spread * (1.0 if bits == 1 else 0.6 / (2**bits - 1)) + weight.abs().amax() * 2**-8
    assert float(error) <= float(allowed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_bits_help_groups_far_from_zero(bits: int) -> None:
    """Values between 0.8 and 1: eight bits must not fall back to one value per group."""
    weight = 0.8 + 0.2 * torch.rand(4, 64, generator=torch.Generator().manual_seed(1))
    error = (quantize_rtn(weight, bits, 64).dequantize() - weight).abs().max()
    assert float(error) <= 0.2 / (2**bits - 1) + 2**-10


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-7, 1e-5, 1.0, 1e4, 1e7, 1e30])
def test_any_magnitude_gives_usable_scales(name: str, bits: int, size: float) -> None:
    weight = gaussian(4, 64, size)
    result = FUNCTIONS[name](weight, bits, 32)
    assert bool(torch.isfinite(result.scales).all())
    assert bool((result.scales != 0).all())
    assert bool(torch.isfinite(result.zeros).all())


@pytest.mark.parametrize(("name", "bits"), SCALED)
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e4, 1e7])
def test_the_error_scales_with_the_weights(name: str, bits: int, size: float) -> None:
    def error(weight: torch.Tensor) -> float:
        return float((FUNCTIONS[name](weight, bits, 32).dequantize() - weight).norm() / weight.norm())

    assert error(gaussian(4, 64, size)) == pytest.approx(error(gaussian(4, 64, 0.02)), rel=0.25, abs=0.004)


@pytest.mark.parametrize(("name", "bits"), SCALED)
def test_huge_and_tiny_groups_in_one_matrix(name: str, bits: int) -> None:
    weight = gaussian(4, 64)
    weight[:, :32] *= 1e6
    weight[:, 32:] *= 1e-6
    found = FUNCTIONS[name](weight, bits, 32).dequantize()
    error = ((found - weight).reshape(8, 32).norm(dim=1) / weight.reshape(8, 32).norm(dim=1)).max()
    assert float(error) < 0.8


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(name: str, bits: int, bad: float) -> None:
    weight = gaussian(2, 64)
    weight[1, 7] = bad
    with pytest.raises(CheckpointError, match="finite"):
        FUNCTIONS[name](weight, bits, 32)


@pytest.mark.parametrize("name", ["hqq", "rtn"])
def test_weights_beyond_bfloat16_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="finite"):
        FUNCTIONS[name](torch.tensor([[3e38, -3e38] * 16]), 1, 32)


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize(("columns", "group_size"), [(48, 16), (48, -1), (96, 64), (64, 128)])
def test_columns_that_do_not_divide_are_refused(name: str, bits: int, columns: int, group_size: int) -> None:
    with pytest.raises(CheckpointError, match="multiple"):
        FUNCTIONS[name](gaussian(2, columns), bits, group_size)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_result_has_the_documented_shapes(name: str, bits: int) -> None:
    result = FUNCTIONS[name](gaussian(6, 256).bfloat16(), bits, 64)
    assert (result.codes.dtype, result.codes.shape) == (torch.uint8, (6, 256))
    assert (result.scales.dtype, result.scales.shape) == (torch.float16, (6, 4))
    assert (result.zeros.dtype, result.zeros.shape) == (torch.float16, (6, 4))
    assert int(result.codes.max()) < 2**bits


@pytest.mark.parametrize("name", ["hqq", "gptq"])
@pytest.mark.parametrize(("bits", "expected"), [(1, "sign"), (2, "hqq"), (8, "hqq")])
def test_one_bit_has_its_own_quantizer(name: str, bits: int, expected: str) -> None:
    assert quantizer_for(bits, name, "sign") is FUNCTIONS[expected]


def test_the_table_names_these_functions() -> None:
    own = {name: row.rounds["float"] for name, row in QUANTIZERS.items() if not row.calibrated and row.scheme is GRID}
    assert own == FUNCTIONS


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_row_quantizes_to_all_of_its_widths(name: str) -> None:
    row = QUANTIZERS[name]
    assert set(row.widths) <= set(BIT_WIDTHS)
    for zero_points in row.rounds:
        for bits in row.widths:
            scheme = row.scheme
            result = quantizer_for(bits, name, name, zero_points, scheme)(gaussian(16, 64), bits, 32)
            assert scheme.layout(16, 64, bits, 32) == {
                suffix: TensorLayout(scheme.layout(16, 64, bits, 32)[suffix].dtypes, tuple(tensor.shape))
                for suffix, tensor in result.tensors().items()
            }
    if row.fallback is not None:
        alone = QUANTIZERS[row.fallback]
        assert alone.rounds
        assert alone.scheme is row.scheme
        assert set(row.widths) <= set(alone.widths)
    for other_scheme, other in row.others.items():
        assert QUANTIZERS[other].scheme is SCHEMES[other_scheme]
        assert QUANTIZERS[other].calibrated == row.calibrated
        assert quantizer_name(SCHEMES[other_scheme], name) == other


def test_what_a_row_leaves_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer need not offer every width, nor both kinds of zero points."""
    monkeypatch.setitem(QUANTIZERS, "narrow", QuantizerRow((4, 8), {"float": quantize_rtn}))
    check_widths("narrow", (1, 4, 8))
    with pytest.raises(UsageError, match=r"--quantizer narrow: expected widths among 4, 8 \(--bits\), found 2"):
        check_widths("narrow", (1, 2, 3, 4))
    QuantizeSettings("narrow")
    with pytest.raises(UsageError, match="integer: expected --quantizer hqq or rtn or gptq with it, found narrow"):
        QuantizeSettings("narrow", zero_points="integer")


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.1), (8, 0.008)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linears_read_by_compressed_tensors_are_close(bits: Literal[4, 8], bound: float, dtype: torch.dtype) -> None:
    weight = gaussian(16, 256).to(dtype)
    tensors = quantize_linear(weight, Linear(bits=bits, group_size=64))
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(tensors["weight_shape"].tolist()))
    found = codes.float() * tensors["weight_scale"].float().repeat_interleave(64, dim=1)
    assert float((found - weight.float()).norm() / weight.float().norm()) < bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e4])
def test_linears_of_any_magnitude_get_usable_scales(bits: Literal[4, 8], size: float) -> None:
    scale = quantize_linear(gaussian(4, 64, size).bfloat16(), Linear(bits=bits, group_size=32))["weight_scale"]
    assert bool((torch.isfinite(scale) & (scale > 0)).all())


def test_linears_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="finite"):
        quantize_linear(torch.full((2, 64), float("nan")), Linear(bits=4, group_size=32))


@pytest.mark.parametrize(
    ("sizes", "expected"), [([4096, 512], 128), ([4096, 256], 64), ([64], 32), ([128, 96], 32), ([], 128)]
)
def test_linear_groups_survive_a_split_in_four(sizes: list[int], expected: int) -> None:
    assert linear_group_size(sizes) == expected

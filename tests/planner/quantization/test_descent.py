"""What follows GPTQ never raises the error, ends where no code is better, and stays in the stored format."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.quantization.quantizers.base import MAX_ZERO, Quantized, ZeroPoints
from planner.quantization.quantizers.gptq import PUBLISHED, GptqSettings, quantize_gptq
from planner.quantization.quantizers.hessian import ActOrder
from tests.planner.quantization.test_gptq import output_error, problem

pytestmark = pytest.mark.slow

WIDTHS = [2, 3, 4, 8]
DAMPING = 0.01


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """Return the moments whose error GPTQ lowers."""
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


def solved(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, chosen: GptqSettings) -> Quantized:
    return quantize_gptq(weight[None], hessian[None].clone(), bits, group, chosen)[0]


@settings(deadline=None, max_examples=30)
@given(
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from([32, 64, -1]),
    symmetric=st.booleans(),
    zero_points=st.sampled_from(["float", "integer"]),
    offset=st.sampled_from([0.0, 0.1, -3.0]),
    sweeps=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_each_sweep_lowers_the_error(
    bits: int, group: int, symmetric: bool, zero_points: ZeroPoints, offset: float, sweeps: int, seed: int
) -> None:
    weight, hessian = problem(16, 128, tokens=512, seed=seed)
    weight += offset
    errors = []
    for count in (sweeps - 1, sweeps):
        chosen = GptqSettings(symmetric=symmetric, damping=DAMPING, sweeps=count)
        found = quantize_gptq(weight[None], hessian[None].clone(), bits, group, chosen, zero_points)[0]
        assert int(found.codes.max()) < 2**bits
        assert bool(torch.isfinite(found.scales).all())
        assert bool((found.scales > 0).all())
        assert float(found.zeros.abs().max()) <= MAX_ZERO
        if zero_points == "integer" or symmetric:
            assert torch.equal(found.zeros, found.zeros.round())
        errors.append(output_error(weight, found.dequantize(), damped(hessian)))
    assert errors[1] <= errors[0] * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_lowers_the_error_of_tiny_weights(seed: int) -> None:
    """Their squares are 0 in float32."""
    weight, hessian = problem(16, 128, tokens=512, seed=seed)
    weight *= 2e-20 / weight.std()
    errors = []
    for count in range(4):
        found = solved(weight, hessian, 4, 32, GptqSettings(damping=DAMPING, sweeps=count))
        error = weight.double() - found.dequantize().double()
        errors.append((error @ damped(hessian).double() * error).sum(dim=1))
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_one_sweep_is_worth_its_time(bits: int) -> None:
    weight, hessian = problem(64, 512)
    plain, better = (
        output_error(weight, solved(weight, hessian, bits, 128, GptqSettings(sweeps=count)).dequantize(), hessian)
        for count in (0, 1)
    )
    assert better < 0.97 * plain


def test_in_the_end_no_other_code_is_better() -> None:
    """Against every single change of a code, in float64."""
    weight, hessian = problem(4, 64, tokens=512)
    found = solved(weight, hessian, 2, 32, GptqSettings(sweeps=50))
    moments = damped(hessian).double()
    scales, zeros = (part.double().repeat_interleave(32, dim=1) for part in (found.scales, found.zeros))
    error = weight.double() - (found.codes.double() - zeros) * scales
    least = (error @ moments * error).sum(dim=1)
    for column in range(64):
        for code in range(4):
            changed = error.clone()
            changed[:, column] = weight[:, column].double() - (code - zeros[:, column]) * scales[:, column]
            assert bool(((changed @ moments * changed).sum(dim=1) >= least * (1 - 1e-4)).all())


def test_the_levels_are_the_best_for_their_codes() -> None:
    """A line through the codes by torch's solver, with one group for the whole row."""
    weight, hessian = problem(8, 64, tokens=512)
    found = solved(weight, hessian, 3, -1, GptqSettings(sweeps=50))
    root = torch.linalg.cholesky(damped(hessian).double(), upper=True)
    for row, codes, scale, zero in zip(weight.double(), found.codes.double(), found.scales, found.zeros, strict=True):
        basis = root @ torch.stack((codes, torch.ones_like(codes)), dim=1)
        slope, offset = torch.linalg.lstsq(basis, (root @ row)[:, None]).solution[:, 0].tolist()
        assert float(scale) == pytest.approx(slope, rel=2e-3)
        assert float(-zero * scale) == pytest.approx(offset, abs=2e-3 * slope * 8)


@pytest.mark.parametrize("chosen", [GptqSettings(sweeps=0), PUBLISHED, GptqSettings(static_groups=True)], ids=str)
def test_without_sweeps_or_with_static_groups_it_is_gptq_alone(
    chosen: GptqSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem(16, 128)
    expected = solved(weight, hessian, 3, 32, chosen).dequantize()
    called: list[object] = []
    monkeypatch.setattr("planner.quantization.quantizers.gptq.descend", lambda *given: called.append(given))
    assert torch.equal(solved(weight, hessian, 3, 32, chosen).dequantize(), expected)
    assert not called
    solved(weight, hessian, 3, 32, GptqSettings())
    assert called


@pytest.mark.parametrize("act_order", ["none", "group"])
def test_a_batch_is_its_matrices_in_any_order_of_columns(act_order: ActOrder) -> None:
    chosen = GptqSettings(act_order=act_order)
    problems = [problem(16, 128, seed=seed) for seed in range(3)]
    weights, hessians = (torch.stack(parts) for parts in zip(*problems, strict=True))
    together = quantize_gptq(weights, hessians.clone(), 2, 32, chosen, storage=torch.bfloat16)
    for found, (weight, hessian) in zip(together, problems, strict=True):
        assert found.scales.dtype == torch.bfloat16
        alone = quantize_gptq(weight[None], hessian[None].clone(), 2, 32, chosen, storage=torch.bfloat16)[0]
        errors = [output_error(weight, it.dequantize(), damped(hessian)) for it in (found, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_one_bit_stays_the_sign_times_the_mean() -> None:
    weight, hessian = problem(16, 128)
    first, second = (solved(weight, hessian, 1, 64, GptqSettings(sweeps=count)) for count in (0, 3))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_constant_groups_and_dead_inputs_stay_exact() -> None:
    weight, hessian = problem(8, 64)
    weight[0] = 0.25
    weight[1] = 0
    hessian[3] = hessian[:, 3] = 0
    found = solved(weight, hessian, 2, 32, GptqSettings(sweeps=3)).dequantize()
    assert bool((found[0] == 0.25).all())
    assert not found[1].any()
    assert bool(torch.isfinite(found).all())

"""Trellis codes: the two searches agree, and the quantizer makes use of what it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.quantization.quantizers.target import Aim
from planner.quantization.quantizers.trellis import SMALLEST, quantize_trellis
from planner.quantization.quantizers.viterbi import best_bits, codes_by_age, encode
from vllm_moeq.format import CENTRE, TRELLIS_SCHEME, TRELLIS_WIDTHS, CheckpointError, codes_of_states, ring_states
from vllm_moeq.kernels.cpu.encode import native_encode
from vllm_moeq.kernels.cpu.layer import ISA_VARIABLE, instruction_sets

BEST_GRID = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}
"""Mean squared errors of the best scalar quantizers of a normal distribution (Max, 1960)."""


def gaussian(tiles: int, seed: int = 0) -> torch.Tensor:
    """Return normal weights in units of codes, [tiles, 256]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, 256, generator=generator) * 18 + CENTRE


def decoded(own: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of tiles as floats."""
    return codes_of_states()[ring_states(own, bits).int()].float()


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_beats_every_scalar_quantizer(bits: int) -> None:
    weights = gaussian(64)
    codes = decoded(best_bits(weights, bits), bits) - CENTRE
    target = weights - CENTRE
    scale = (codes * target).sum() / codes.square().sum()
    error = (codes * scale - target).square().mean() / target.square().mean()
    assert error < 0.85 * BEST_GRID[bits]


@given(
    seed=st.integers(0, 1 << 30), spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]), bits=st.sampled_from(TRELLIS_WIDTHS)
)
@settings(max_examples=12, deadline=None)
def test_torch_and_the_library_find_the_same(seed: int, spread: float, bits: int) -> None:
    weights = (gaussian(2, seed) - CENTRE) * spread + CENTRE
    weights[0, seed % 256] = (float("nan"), float("inf"), -float("inf"))[seed % 3]
    native = native_encode(weights, codes_by_age(bits), bits)
    assert native is not None
    assert torch.equal(native, encode(weights, bits))


@pytest.mark.parametrize("isa", instruction_sets())
def test_instruction_sets_find_the_same(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = gaussian(3)
    expected = [best_bits(weights, bits) for bits in TRELLIS_WIDTHS]
    monkeypatch.setenv(ISA_VARIABLE, isa)
    for bits, own in zip(TRELLIS_WIDTHS, expected, strict=True):
        assert torch.equal(best_bits(weights, bits), own)


def test_threads_find_the_same() -> None:
    weights, before = gaussian(21), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = best_bits(weights, 2)
        torch.set_num_threads(2)
        assert torch.equal(best_bits(weights, 2), alone)
    finally:
        torch.set_num_threads(before)


def moments(inputs: torch.Tensor) -> torch.Tensor:
    """Return the second moments of inputs [B, n, K]."""
    return inputs.mT @ inputs / inputs.shape[1]


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices, and correlated inputs for each; more columns than are passed on at a time."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 32, 288, generator=generator) * 0.02
    mix = torch.randn(288, 288, generator=generator)
    return weights, torch.randn(2, 900, 288, generator=generator) @ mix


def output_error(found: torch.Tensor, weights: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the squared error of the outputs, relative to their squares."""
    wanted = inputs @ weights.mT
    return float((inputs @ found.mT - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_moments_make_the_outputs_better(bits: int, problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, inputs = problem
    plain = torch.stack([it.dequantize() for it in quantize_trellis(weights, None, bits)])
    fitted = torch.stack([it.dequantize() for it in quantize_trellis(weights, moments(inputs), bits)])
    assert output_error(fitted, weights, inputs) < 0.75 * output_error(plain, weights, inputs)


def test_scales_are_the_best_for_their_codes(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, inputs = problem
    second = moments(inputs)
    second += 0.01 * second.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(288)
    for found, weight, moment in zip(
        quantize_trellis(weights, second.clone(), 2, damping=0.0), weights, second, strict=True
    ):
        codes = found.dequantize() / found.scales.float()[:, None]
        best = ((codes @ moment) * weight).sum(dim=1) / ((codes @ moment) * codes).sum(dim=1)
        torch.testing.assert_close(found.scales.float(), best, rtol=2e-3, atol=0)


def test_aims_at_the_original_models_inputs(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights, inputs = problem
    second = moments(inputs)
    found = quantize_trellis(weights, second.clone(), 4, damping=1e-4, aim=Aim(second))  # o = 2x
    both = torch.stack([it.dequantize() for it in found])
    assert output_error(both, 2 * weights, inputs) < 0.01


def test_tensors_are_the_schemes(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = quantize_trellis(problem[0], None, 3)[0]
    tensors, layout = found.tensors(), TRELLIS_SCHEME.layout(32, 288, 3, 128)
    assert {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()} == {
        suffix: it.shape for suffix, it in layout.items()
    }
    assert torch.equal(TRELLIS_SCHEME.dequantize(tensors, 3, 128), found.dequantize())
    assert torch.equal(found.rows(slice(16, 32)).dequantize(), found.dequantize()[16:])


def test_rows_of_zeros_stay_small() -> None:
    found = quantize_trellis(torch.zeros(1, 16, 32), None, 2)[0]
    assert float(found.scales.min()) == SMALLEST
    assert float(found.dequantize().abs().max()) < 4 * SMALLEST


def test_large_weights_have_bfloat16_scales() -> None:
    found = quantize_trellis(torch.full((1, 16, 32), 16000.0), None, 2)[0]
    assert bool(torch.isfinite(found.scales).all())


@pytest.mark.parametrize("shape", [(1, 24, 32), (1, 16, 48)])
def test_refuses_other_shapes(shape: tuple[int, int, int]) -> None:
    with pytest.raises(CheckpointError, match="multiple of 16 output neurons and of 32 inputs"):
        quantize_trellis(torch.zeros(shape), None, 2)


def test_refuses_nan() -> None:
    with pytest.raises(CheckpointError, match="finite"):
        quantize_trellis(torch.full((1, 16, 32), float("nan")), None, 2)

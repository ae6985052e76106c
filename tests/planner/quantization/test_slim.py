"""Slim-LLM: its parts against their textbook forms in float64, and its error against that of one width."""

from __future__ import annotations

import pytest
import torch

from planner.quantization.quantizers import slim
from planner.quantization.quantizers.gptq import PUBLISHED, GptqSettings, quantize_gptq
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError, factorize
from planner.quantization.quantizers.slim import group_salience, quantize_slim
from vllm_moeq.format import CheckpointError

PLAIN = GptqSettings(act_order="none", search="range", sweeps=0)
GROUP = 32


def problem(
    rows: int = 96, columns: int = 256, spread: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights [N, K], moments [K, K] and correlated inputs; ``spread`` is how much groups differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn((columns, columns), generator=generator) * 0.1 + torch.eye(columns)
    inputs = torch.randn((1024, columns), generator=generator) @ mixing
    sizes = torch.exp(spread * torch.randn(columns // GROUP, generator=generator)).repeat_interleave(GROUP)
    weight = torch.randn((rows, columns), generator=generator) * 0.05 * sizes
    return weight, inputs.mT @ inputs / len(inputs), inputs


def output_error(weight: torch.Tensor, found: torch.Tensor, moments: torch.Tensor) -> float:
    """Return ‖(W − Ŵ)X‖ / ‖WX‖."""
    difference, exact, hessian = (found - weight).double(), weight.double(), moments.double()
    squared = (difference @ hessian * difference).sum() / (exact @ hessian * exact).sum()
    return float(squared.sqrt())


def uniform(weight: torch.Tensor, moments: torch.Tensor, bits: int, settings: GptqSettings) -> torch.Tensor:
    return quantize_gptq(weight[None], moments[None].clone(), bits, GROUP, settings)[0].dequantize()


def inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped inverse, in float64."""
    damped = moments.double() + 0.01 * moments.diagonal().double().mean() * torch.eye(len(moments)).double()
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def levels(group: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero [N] of a group's range, or of its mean magnitude for one bit."""
    if bits == 1:
        return 2 * group.abs().mean(1), torch.full_like(group[:, 0], 0.5)
    scale = (group.amax(1) - group.amin(1)) / (2**bits - 1)
    return scale, -group.amin(1) / scale


def rounded(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    return ((values / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def mixed_gptq(weight: torch.Tensor, moments: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """GPTQ as it is usually written, in float64, with a width per group."""
    left, upper = weight.double().clone(), inverse_factor(moments)
    result = torch.empty_like(left)
    for column in range(weight.shape[1]):
        bits = widths[column // GROUP]
        if column % GROUP == 0:
            scale, zero = (found.half().double() for found in levels(left[:, column : column + GROUP], bits))
        result[:, column] = rounded(left[:, column], scale, zero, bits)
        error = (left[:, column] - result[:, column]) / upper[column, column]
        left[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return result.float()


def textbook_salience(weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    diagonal = inverse_factor(moments).diagonal()
    return (weight.double() ** 2 / diagonal**2).unflatten(1, (-1, GROUP)).sum(dim=(0, 2))


def test_salience_is_the_textbook_formula() -> None:
    weight, moments, _ = problem(spread=1.0)
    cost = factorize(moments[None].clone(), 0.01).cost[0]
    expected = textbook_salience(weight, moments)
    assert torch.allclose(group_salience(weight, cost, GROUP).double(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("bits", "spread", "seed", "changed"), [(2, 1.2, 1, 3), (3, 0.4, 0, 0), (3, 0.7, 1, 1), (4, 1.0, 1, 3)]
)
def test_widths_are_those_of_a_search_that_starts_anew_each_time(
    bits: int, spread: float, seed: int, changed: int
) -> None:
    weight, moments, inputs = problem(spread=spread, seed=seed)
    ranking = textbook_salience(weight, moments).argsort(descending=True).tolist()
    exact = (inputs @ weight.mT).double().log_softmax(dim=1)
    best, expected = float("inf"), []
    for k in range(len(ranking) // 2 + 1):
        widths = [bits + (g in ranking[:k]) - (g in ranking[len(ranking) - k :]) for g in range(len(ranking))]
        groups = zip(weight.split(GROUP, dim=1), widths, strict=True)
        parts = []
        for part, width in groups:
            scale, zero = (value[:, None] for value in levels(part, width))
            parts.append(rounded(part, scale, zero, width))
        found = (inputs @ torch.cat(parts, dim=1).mT).double().log_softmax(dim=1)
        divergence = float((found.exp() * (found - exact)).sum())
        if divergence < best:
            best, expected = divergence, widths
    assert quantize_slim(weight, moments, inputs, bits, GROUP, PLAIN)[1] == expected
    assert expected.count(bits + 1) == changed


def test_inputs_may_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments, inputs = problem(spread=0.4)
    whole = quantize_slim(weight, moments, inputs, 3, GROUP, PLAIN)[1]
    monkeypatch.setattr(slim, "TOKENS", 100)
    assert quantize_slim(weight, moments, inputs, 3, GROUP, PLAIN)[1] == whole


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_plain_gptq_of_the_same_widths(bits: int) -> None:
    weight, moments, inputs = problem(spread=1.0)
    found, widths = quantize_slim(weight, moments, inputs, bits, GROUP, PLAIN)
    assert min(widths) < bits < max(widths)
    expected = mixed_gptq(weight, moments, widths)
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.98
    assert output_error(weight, found, moments) == pytest.approx(output_error(weight, expected, moments), rel=0.002)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("settings", [PLAIN, GptqSettings(), PUBLISHED], ids=str)
def test_without_a_change_is_gptq(bits: int, settings: GptqSettings) -> None:
    weight, moments, inputs = problem()
    found, widths = quantize_slim(weight, moments, inputs[:0], bits, GROUP, settings)
    assert widths == [bits] * 8
    assert found.dtype == torch.float32
    expected = uniform(weight, moments, bits, settings)
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.97
    assert output_error(weight, found, moments) == pytest.approx(output_error(weight, expected, moments), rel=0.005)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_average_width_is_the_one_asked_for(bits: int, groups: int) -> None:
    weight, moments, inputs = problem(32, groups * GROUP, spread=1.5)
    found, widths = quantize_slim(weight, moments, inputs, bits, GROUP, GptqSettings())
    assert sum(widths) == bits * groups
    assert set(widths) <= ({bits} if bits in (1, 8) else {bits - 1, bits, bits + 1})
    assert bool(torch.isfinite(found).all())


def test_one_group_per_row_keeps_its_width() -> None:
    weight, moments, inputs = problem()
    assert quantize_slim(weight, moments, inputs, 3, -1, GptqSettings())[1] == [3]


@pytest.mark.parametrize("order", ["none", "group"])
def test_widths_follow_the_order_of_the_columns(order: str) -> None:
    """Each group has at most as many levels as its width, in the place where that width is reported."""
    weight, moments, inputs = problem(spread=1.0)
    chosen = GptqSettings(act_order=order)  # type: ignore[arg-type]
    found, widths = quantize_slim(weight, moments, inputs, 2, GROUP, chosen)
    assert set(widths) == {1, 2, 3}
    for group, bits in zip(found.split(GROUP, dim=1), widths, strict=True):
        most = max(len(row.unique()) for row in group)
        assert 2 ** (bits - 1) < most <= 2**bits
        if bits == 1:
            assert torch.allclose(group.abs(), group[:, :1].abs(), rtol=1e-6)


@pytest.mark.parametrize("settings", [PLAIN, GptqSettings(), PUBLISHED], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_two_bits_are_no_worse_than_uniform_ones(settings: GptqSettings, seed: int) -> None:
    weight, moments, inputs = problem(seed=seed)
    error = output_error(weight, quantize_slim(weight, moments, inputs, 2, GROUP, settings)[0], moments)
    assert error < 1.03 * output_error(weight, uniform(weight, moments, 2, settings), moments)


@pytest.mark.parametrize("settings", [PLAIN, GptqSettings(), PUBLISHED], ids=str)
@pytest.mark.parametrize("bits", [2, 3])
def test_groups_of_unequal_salience_gain(settings: GptqSettings, bits: int) -> None:
    weight, moments, inputs = problem(spread=1.0)
    error = output_error(weight, quantize_slim(weight, moments, inputs, bits, GROUP, settings)[0], moments)
    assert error < 0.9 * output_error(weight, uniform(weight, moments, bits, settings), moments)


def test_arguments_stay_as_they_are() -> None:
    arguments = problem(spread=1.0)
    before = [argument.clone() for argument in arguments]
    weight, moments, inputs = arguments
    first = quantize_slim(weight, moments, inputs, 2, GROUP, GptqSettings())
    assert all(torch.equal(argument, old) for argument, old in zip(arguments, before, strict=True))
    again = quantize_slim(weight, moments, inputs, 2, GROUP, GptqSettings())
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]


def test_weights_and_inputs_of_zero() -> None:
    weight, moments, inputs = problem()
    weight[:2] = 0
    inputs[:, 5] = 0
    moments[5] = moments[:, 5] = 0
    found, _ = quantize_slim(weight, moments, inputs, 3, GROUP, GptqSettings())
    assert bool(torch.isfinite(found).all())
    assert not found[:2].any()
    zero = torch.zeros_like(weight)
    assert not quantize_slim(zero, moments, inputs, 3, GROUP, GptqSettings())[0].any()


def test_half_precision() -> None:
    weight, moments, inputs = problem(spread=1.0)
    found, _ = quantize_slim(weight.bfloat16(), moments, inputs.bfloat16(), 3, GROUP, GptqSettings())
    assert found.dtype == torch.float32
    assert output_error(weight, found, moments) < 0.3


def test_refusals() -> None:
    weight, moments, inputs = problem()
    for bits in (0, 9):
        with pytest.raises(ValueError, match="bits"):
            quantize_slim(weight, moments, inputs, bits, GROUP, PLAIN)
    for settings in (GptqSettings(static_groups=True), GptqSettings(act_order="full")):
        with pytest.raises(ValueError, match="not static"):
            quantize_slim(weight, moments, inputs, 3, GROUP, settings)
    with pytest.raises(CheckpointError, match="multiple of 32"):
        quantize_slim(weight[:, :40], moments[:40, :40], inputs[:, :40], 3, GROUP, PLAIN)
    with pytest.raises(NotPositiveDefiniteError, match="not finite"):
        quantize_slim(weight, moments / 0, inputs, 3, GROUP, PLAIN)
    inputs[3, 4] = float("nan")
    with pytest.raises(ValueError, match="finite inputs"):
        quantize_slim(weight, moments, inputs, 3, GROUP, PLAIN)
    weight[2, 3] = float("inf")
    with pytest.raises(CheckpointError, match="finite weights"):
        quantize_slim(weight, moments, inputs, 3, GROUP, PLAIN)

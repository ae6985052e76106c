"""GPTQ of one matrix: against plain GPTQ in float64, against GPTQModel, and in odd cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from planner.quantization.quantizers import quantize_hqq, quantize_rtn
from planner.quantization.quantizers.gptq import PUBLISHED, GptqSettings, quantize_gptq
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError, column_order, factorize
from vllm_moeq.format import BIT_WIDTHS, CheckpointError

pytestmark = pytest.mark.slow

PLAIN = GptqSettings(act_order="none", search="range", sweeps=0)


def problem(rows: int, columns: int, tokens: int = 2048, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [N, K] and the second moments [K, K] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn((columns, columns), generator=generator) * 0.1 + torch.eye(columns)
    inputs = torch.randn((tokens, columns), generator=generator) @ mixing
    return torch.randn((rows, columns), generator=generator) * 0.02, inputs.mT @ inputs / tokens


def output_error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return ‖(W − Ŵ)X‖ / ‖WX‖."""
    difference, exact, moments = (found - weight).double(), weight.double(), hessian.double()
    squared = (difference @ moments * difference).sum() / (exact @ moments * exact).sum()
    return float(squared.sqrt())


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The method as it is usually written, in float64: inverse, Cholesky, one column at a time."""
    left, moments = weight.double().clone(), hessian.double().clone()
    columns = weight.shape[1]
    moments.diagonal().add_(0.01 * moments.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    result = torch.empty_like(left)
    for column in range(columns):
        if column % group_size == 0:
            group = left[:, column : column + group_size]
            scale = ((group.amax(1) - group.amin(1)) / (2**bits - 1)).float()
            zero = (-group.amin(1).float() / scale).half().double()
            scale = scale.half().double()
        codes = torch.round(left[:, column] / scale + zero).clamp(0, 2**bits - 1)
        result[:, column] = (codes - zero) * scale
        error = (left[:, column] - result[:, column]) / upper[column, column]
        left[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return result.float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_equals_plain_gptq(bits: int, group_size: int) -> None:
    """The factored form, and passing errors on by halves, change nothing but rounding."""
    weight, hessian = problem(96, 384)
    expected = plain_gptq(weight, hessian, bits, group_size)
    found = quantize_gptq(weight[None], hessian[None].clone(), bits, group_size, PLAIN)[0].dequantize()
    same = (found - expected).abs() < 1e-6
    assert same.float().mean() > 0.98
    assert output_error(weight, found, hessian) == pytest.approx(output_error(weight, expected, hessian), rel=0.002)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What GPTQModel makes of the same problem, by width and symmetry; in another process, since importing it changes
    transformers."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    weight, hessian = problem(256, 512)
    save_file({"weight": weight, "hessian": hessian}, folder / "problem.safetensors")
    script = Path(__file__).with_name("gptqmodel_core.py")
    names = [str(folder / name) for name in ("problem.safetensors", "results.safetensors")]
    subprocess.run([sys.executable, script, *names], check=True, cwd=folder, timeout=300)
    return load_file(names[1])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_gptqmodel(bits: int, symmetric: bool, theirs: dict[str, torch.Tensor]) -> None:
    weight, hessian = problem(256, 512)
    expected = theirs[f"{bits}-{symmetric}"]
    ours = GptqSettings(act_order="none", search="range", symmetric=symmetric, sweeps=0)
    zeros = "float" if symmetric else "integer"
    result = quantize_gptq(weight[None], hessian[None].clone(), bits, 128, ours, zeros)[0]  # type: ignore[arg-type]
    found = result.dequantize()
    error = output_error(weight, expected, hessian)
    assert output_error(weight, found, hessian) == pytest.approx(error, rel=0.01)
    steps = (found - expected).abs() / result.scales.float().repeat_interleave(128, dim=1)
    # Theirs rounds the scales after the codes are chosen: with many steps, some codes are neighbours.
    assert (steps < 1.1).float().mean() > 0.97
    if bits <= 3:
        assert (steps < 0.1).float().mean() > 0.95


@pytest.mark.parametrize("bits", [2, 3])
def test_beats_quantizers_without_calibration(bits: int) -> None:
    weight, hessian = problem(128, 256)
    held_out = problem(128, 256, seed=0)[1] * 0.5 + torch.eye(256) * 0.5
    found = quantize_gptq(weight[None], hessian[None].clone(), bits, 128, GptqSettings())[0].dequantize()
    for other in (quantize_rtn, quantize_hqq):
        theirs = other(weight, bits, 128).dequantize()
        assert output_error(weight, found, hessian) < 0.8 * output_error(weight, theirs, hessian)
        assert output_error(weight, found, held_out) < output_error(weight, theirs, held_out)


@pytest.mark.parametrize("better", [GptqSettings(act_order="none"), GptqSettings(), PUBLISHED], ids=str)
def test_searching_scales_helps(better: GptqSettings) -> None:
    weight, hessian = problem(128, 256)
    plain = quantize_gptq(weight[None], hessian[None].clone(), 2, 64, PLAIN)[0].dequantize()
    found = quantize_gptq(weight[None], hessian[None].clone(), 2, 64, better)[0].dequantize()
    assert output_error(weight, found, hessian) < output_error(weight, plain, hessian)


def test_one_bit_passes_its_errors_on() -> None:
    weight, hessian = problem(64, 256)
    result = quantize_gptq(weight[None], hessian[None].clone(), 1, 64, GptqSettings())[0]
    assert torch.all(result.zeros == 0.5)
    assert set(result.codes.unique().tolist()) == {0, 1}
    alpha = weight.reshape(64, 4, 64).abs().mean(dim=2, keepdim=True)
    signs = (torch.where(weight >= 0, 1.0, -1.0).reshape(64, 4, 64) * alpha).flatten(1)
    assert output_error(weight, result.dequantize(), hessian) < 0.9 * output_error(weight, signs, hessian)


@pytest.mark.parametrize(
    ("order", "static"), [("none", False), ("none", True), ("group", False), ("group", True), ("full", True)]
)
def test_a_batch_is_its_matrices(order: str, static: bool) -> None:
    chosen = GptqSettings(act_order=order, static_groups=static)  # type: ignore[arg-type]
    problems = [problem(32, 128, seed=seed) for seed in range(3)]
    weights, hessians = (torch.stack(parts) for parts in zip(*problems, strict=True))
    together = quantize_gptq(weights, hessians.clone(), 3, 32, chosen)
    for result, (weight, hessian) in zip(together, problems, strict=True):
        alone = quantize_gptq(weight[None], hessian[None].clone(), 3, 32, chosen)[0]
        assert (result.codes != alone.codes).float().mean() < 0.02
        assert output_error(weight, result.dequantize(), hessian) == pytest.approx(
            output_error(weight, alone.dequantize(), hessian), rel=0.02
        )


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_scales_and_zeros_fit_the_format(bits: int, group_size: int, symmetric: bool) -> None:
    weight, hessian = problem(32, 96, seed=2)
    weight[0] = 0
    weight[1] = 3.5
    result = quantize_gptq(weight[None], hessian[None], bits, group_size, GptqSettings(symmetric=symmetric))[0]
    assert result.codes.shape == weight.shape
    assert int(result.codes.max()) < 2**bits
    assert result.scales.shape == result.zeros.shape == (32, 1 if group_size == -1 else 3)
    assert bool((result.scales > 0).all())
    assert bool(torch.isfinite(result.zeros).all())
    assert not result.dequantize()[0].any()


def test_integer_zero_points_are_codes() -> None:
    weight, hessian = problem(32, 128)
    weight += 0.05  # ranges on one side of 0
    result = quantize_gptq(weight[None], hessian[None], 3, 32, GptqSettings(), "integer")[0]
    assert torch.equal(result.zeros, result.zeros.round())
    assert 0 <= result.zeros.min() <= result.zeros.max() <= 7


class TestHessian:
    def test_factor_gives_the_damped_matrix_back(self) -> None:
        _, hessian = problem(1, 96)
        factor = factorize(hessian[None].clone(), 0.01)
        unit = factor.feedback[0].triu(1) + torch.eye(96)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
        assert torch.allclose(unit * factor.cost[0] @ unit.mT, damped, atol=1e-4)
        assert factor.damping == [pytest.approx(0.01)]

    def test_more_damping_where_one_is_not_positive_definite(self) -> None:
        _, good = problem(1, 64)
        lowest = torch.linalg.eigvalsh(good)[0] + 0.005 * good.diagonal().mean()
        bad = good - lowest * torch.eye(64)
        factor = factorize(torch.stack((good, bad)), 0.001)
        assert factor.damping[0] == pytest.approx(0.001)
        assert factor.damping[1] > 0.005

    def test_no_damping_helps(self) -> None:
        bad = -10 * torch.ones(1, 64, 64)
        bad.diagonal(dim1=1, dim2=2).fill_(1)
        with pytest.raises(NotPositiveDefiniteError, match="damping"):
            factorize(bad, 0.01)

    def test_not_finite(self) -> None:
        _, hessian = problem(1, 64)
        hessian[3, 3] = float("nan")
        with pytest.raises(NotPositiveDefiniteError, match="not finite"):
            factorize(hessian[None], 0.01)

    def test_inputs_that_are_always_zero_keep_their_weights(self) -> None:
        weight, hessian = problem(32, 64)
        hessian[:, 5] = hessian[5] = 0
        found = quantize_gptq(weight[None], hessian[None], 8, 32, GptqSettings())[0].dequantize()
        assert torch.allclose(found[:, 5], weight[:, 5], atol=1e-3)

    @given(st.integers(0, 10**6), st.sampled_from([32, 64]), st.sampled_from(["none", "group", "full"]))
    @settings(max_examples=30, deadline=None)
    def test_order_is_a_permutation(self, seed: int, size: int, order: str) -> None:
        diagonal = torch.rand((2, 128), generator=torch.Generator().manual_seed(seed))
        found = column_order(diagonal, size, order)  # type: ignore[arg-type]
        assert torch.equal(found.sort(dim=1).values, torch.arange(128).expand(2, 128))
        if order == "group":
            assert torch.equal(found // size, (found[:, ::size] // size).repeat_interleave(size, dim=1))


def test_refusals() -> None:
    weight, hessian = problem(8, 64)
    with pytest.raises(CheckpointError, match="multiple of 32"):
        quantize_gptq(weight[None, :, :40], hessian[None, :40, :40], 3, 32, PLAIN)
    with pytest.raises(ValueError, match="static_groups"):
        quantize_gptq(weight[None], hessian[None], 3, 32, GptqSettings(act_order="full"))
    weight[2, 3] = float("inf")
    with pytest.raises(CheckpointError, match="finite"):
        quantize_gptq(weight[None], hessian[None], 3, 32, PLAIN)

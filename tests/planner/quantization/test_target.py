"""The weights that GPTQ aims at to make up for inputs that differ from the original model's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.quantization.quantizers.gptq import GptqSettings, quantize_gptq
from planner.quantization.quantizers.hessian import ActOrder, column_order, factorize
from planner.quantization.quantizers.linear import quantize_linear, quantize_linears_gptq
from planner.quantization.quantizers.target import Aim, corrected
from vllm_moeq.format import Linear, linear_values
from vllm_moeq.format.linears import SCALES, SHAPE, WORDS


def streams(columns: int, tokens: int, seed: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of the original model and those behind a layer with errors, float32 [tokens, K] each."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn((columns, columns), generator=generator) * 0.3 + torch.eye(columns)
    original = torch.randn((tokens, columns), generator=generator) @ mixing
    wrong = torch.eye(columns) + noise * torch.randn((columns, columns), generator=generator) / columns**0.5
    return original, original @ wrong + noise * torch.randn((tokens, columns), generator=generator)


def moments(original: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second moments [1, K, K] and the shifts."""
    return (own.mT @ own / len(own))[None], ((original - own).mT @ own / len(own))[None]


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 99),
    columns=st.sampled_from([32, 64, 96]),
    damping=st.sampled_from([1e-4, 1e-2, 1.0]),
    order=st.sampled_from(["none", "group", "full"]),
    more=st.booleans(),
)
def test_it_is_the_least_squares_solution(seed: int, columns: int, damping: float, order: ActOrder, more: bool) -> None:
    """In float64, by torch's own solver: min ‖VX − (WO + lost)‖² + λ‖V − W‖²."""
    original, own = streams(columns, 4 * columns, seed)
    weight = torch.randn((1, 5, columns), generator=torch.Generator().manual_seed(seed))
    second, shift = moments(original, own)
    places = column_order(second.diagonal(dim1=1, dim2=2), 32, order)
    index = places[:, :, None].expand_as(second)
    factor = factorize(second.gather(1, index).gather(2, index.mT), damping)
    lost = torch.randn((len(own), 5), generator=torch.Generator().manual_seed(seed)) * more
    aim = Aim(shift, (lost.mT @ own / len(own))[None] if more else None)
    found = corrected(weight, aim, factor, places)[0].double()

    root = (damping * float(second[0].diagonal().mean()) * len(own)) ** 0.5
    left = torch.cat((own.double(), root * torch.eye(columns, dtype=torch.float64)))
    right = torch.cat((original.double(), root * torch.eye(columns, dtype=torch.float64))) @ weight[0].double().mT
    right[: len(own)] += lost.double()
    expected = torch.linalg.lstsq(left, right).solution.mT
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_without_shifts_it_is_the_weight_itself() -> None:
    original, own = streams(64, 256, 0)
    weight, (second, _) = torch.randn(2, 8, 64), moments(original, own)
    stacked = second.repeat(2, 1, 1)
    places = column_order(stacked.diagonal(dim1=1, dim2=2), 32, "group")
    assert torch.equal(corrected(weight, Aim(torch.zeros_like(stacked)), factorize(stacked, 0.01), places), weight)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_come_closer_to_the_original_outputs(bits: int) -> None:
    original, own = streams(128, 2048, 1)
    weight = torch.randn((1, 32, 128), generator=torch.Generator().manual_seed(2)) * 0.02
    second, shift = moments(original, own)
    wanted, fit = original @ weight[0].mT, GptqSettings()
    plain = quantize_gptq(weight, second.clone(), bits, 32, fit)[0].dequantize()
    aimed = quantize_gptq(weight, second.clone(), bits, 32, fit, aim=Aim(shift))[0].dequantize()
    errors = [float((own @ matrix.mT - wanted).norm()) for matrix in (plain, aimed)]
    assert errors[1] < 0.95 * errors[0]


class TestLinears:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_less_error_than_rounding_in_the_same_format(self, bits: int) -> None:
        original, own = streams(128, 2048, 3, noise=0.0)
        spec = Linear(bits=bits, group_size=32)  # type: ignore[arg-type]
        weight = (torch.randn((24, 128), generator=torch.Generator().manual_seed(4)) * 0.02).bfloat16()
        second, _ = moments(original, own)
        tuned = quantize_linears_gptq([weight], second[0], None, spec, GptqSettings())[0]
        plain = quantize_linear(weight, spec)
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in tuned.items()} == {
            name: (tensor.dtype, tensor.shape) for name, tensor in plain.items()
        }
        errors = [
            float(((linear_values(found[WORDS], found[SCALES], bits) - weight.float()) @ own.mT).norm())
            for found in (tuned, plain)
        ]
        assert errors[0] < errors[1]

    def test_together_they_are_what_each_is_alone(self) -> None:
        original, own = streams(64, 512, 5)
        second, shift = moments(original, own)
        weights = [torch.randn(rows, 64).to(dtype) for rows, dtype in ((8, torch.bfloat16), (3, torch.bfloat16))]
        spec = Linear(bits=4, group_size=32)
        together = quantize_linears_gptq(weights, second[0], Aim(shift), spec, GptqSettings())
        for weight, found in zip(weights, together, strict=True):
            alone = quantize_linears_gptq([weight], second[0], Aim(shift), spec, GptqSettings())[0]
            assert found[SHAPE].tolist() == list(weight.shape)
            # Products of more rows round otherwise, which moves a code halfway between two, and those after it.
            values, expected = (linear_values(it[WORDS], it[SCALES], 4) for it in (found, alone))
            assert (values - expected).norm() < 0.2 * expected.norm()

    def test_a_group_of_zeros_stays_zero(self) -> None:
        original, own = streams(64, 512, 6, noise=0.0)
        weight = torch.randn(4, 64).half()
        weight[:, 32:] = 0
        spec = Linear(bits=4, group_size=32)
        weight[1] = 0
        found = quantize_linears_gptq([weight], moments(original, own)[0][0], None, spec, GptqSettings())[0]
        assert not linear_values(found[WORDS], found[SCALES], 4)[1].any()

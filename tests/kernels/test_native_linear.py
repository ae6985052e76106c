"""Linears that are no experts in the native CPU kernel, against float64."""

from __future__ import annotations

import pytest
import torch

from vllm_moeq.format import UsageError, linear_values
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.cpu.layer import ISA_VARIABLE
from vllm_moeq.kernels.cpu.linear import NativeLinear

pytestmark = [pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there"), pytest.mark.compiler]
LIMIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
"""Largest ‖difference‖ / ‖exact‖; those of 16 bits are the roundings of the result, which nobody can avoid."""

each_isa = pytest.mark.usefixtures("isa")
both_widths = pytest.mark.parametrize("bits", [4, 8])


def random_linear(
    rows: int, columns: int, group: int, bits: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words and scales."""
    generator = torch.Generator().manual_seed(rows + columns)
    words = torch.randint(-(2**31), 2**31, (rows, columns * bits // 32), generator=generator).int()
    scales = (1 + torch.rand((rows, columns // group), generator=generator)) * 2.0**-bits / columns**0.5
    return words, scales.to(dtype)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@each_isa
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("group", [32, 96, 128, 384])
@both_widths
def test_agrees_with_float64(bits: int, group: int, dtype: torch.dtype) -> None:
    """One token, few, more than are multiplied at once and than a part has; rows that fill no panel."""
    words, scales = random_linear(77, 384, group, bits)
    kernel, exact = NativeLinear(words, scales, bits), linear_values(words, scales, bits).double()
    for tokens in (1, 3, 70, 600):
        x = torch.randn((tokens, 384), generator=torch.Generator().manual_seed(tokens)).to(dtype)
        found = kernel(x)
        assert found.dtype == dtype
        assert found.shape == (tokens, 77)
        assert difference(found, x.double() @ exact.T) < LIMIT[dtype]


@each_isa
@both_widths
@pytest.mark.parametrize("dtype", LIMIT)
def test_unit_vectors_read_out_the_weights_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    words, scales = random_linear(40, 64, 32, bits)
    found = NativeLinear(words, scales, bits)(torch.eye(64).to(dtype))
    assert torch.equal(found, linear_values(words, scales, bits).T.to(dtype))


@each_isa
@both_widths
def test_scales_that_float16_cannot_hold(bits: int) -> None:
    words, scales = random_linear(33, 128, 64, bits)
    scales *= 1e-6
    kernel = NativeLinear(words, scales, bits)
    assert kernel.wide
    assert not NativeLinear(words, scales * 1e6, bits).wide
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(0))
    assert difference(kernel(x), x.double() @ linear_values(words, scales, bits).double().T) < LIMIT[torch.float32]


@both_widths
def test_shapes_of_activations(bits: int) -> None:
    words, scales = random_linear(48, 64, 64, bits)
    kernel = NativeLinear(words, scales, bits)
    x = torch.randn((2, 3, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(kernel(x), kernel(x.reshape(6, 64)).reshape(2, 3, 48))
    assert torch.equal(kernel(x[:, ::2]), kernel(x[:, ::2].contiguous()))
    assert kernel(x[:0]).shape == (0, 3, 48)


@each_isa
@both_widths
def test_neither_threads_nor_other_tokens_change_a_result(bits: int) -> None:
    words, scales = random_linear(200, 256, 64, bits)
    kernel = NativeLinear(words, scales, bits)
    x = torch.randn((90, 256), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = kernel(x)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(kernel(x), together)
        assert torch.equal(torch.cat([kernel(row) for row in x.split(1)]), together)
    finally:
        torch.set_num_threads(before)


@each_isa
@pytest.mark.parametrize("dtype", LIMIT)
def test_both_widths_in_one_model(dtype: torch.dtype) -> None:
    """The calls share scratch memory, and one linear's output is the next one's input."""
    layers = []
    for rows, columns, bits in ((96, 64, 8), (160, 96, 4), (64, 160, 8)):
        words, scales = random_linear(rows, columns, 32, bits)
        layers.append((NativeLinear(words, scales, bits), linear_values(words, scales, bits).double()))
    for tokens in (1, 70):
        x = torch.randn((tokens, 64), generator=torch.Generator().manual_seed(tokens)).to(dtype)
        for kernel, weight in layers:
            found = kernel(x)
            assert difference(found, x.double() @ weight.T) < LIMIT[dtype]
            x = found


@both_widths
def test_infinite_activations_spoil_their_row_alone(bits: int) -> None:
    words, scales = random_linear(32, 64, 64, bits)
    x = torch.ones(2, 64)
    x[0, 5] = float("inf")
    found = NativeLinear(words, scales, bits)(x)
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


@both_widths
def test_weights_of_another_size_are_refused(bits: int) -> None:
    words, scales = random_linear(32, 64, 64, bits)
    kernel = NativeLinear(words, scales, bits)
    kernel.rows = 33
    with pytest.raises(RuntimeError, match=r"expected \d+ bytes of weights, found \d+"):
        kernel(torch.ones(1, 64))


@both_widths
def test_can_be_traced(bits: int) -> None:
    words, scales = random_linear(48, 64, 64, bits)
    kernel = NativeLinear(words, scales, bits)
    x = torch.ones(3, 64)
    assert torch.equal(torch.compile(kernel, backend="eager", fullgraph=True)(x), kernel(x))


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "neon")
    words, scales = random_linear(32, 64, 64, 4)
    with pytest.raises(UsageError, match=r"VLLM_MOEQ_CPU_ISA: expected one of .*, found neon"):
        NativeLinear(words, scales, 4)

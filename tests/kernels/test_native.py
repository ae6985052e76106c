"""The native CPU kernel against float64 and the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.layers import (
    EDGE_ROUTINGS,
    check_same_bits,
    dense,
    edge_routing,
    exact,
    random_layer,
    random_routing,
)
from vllm_moeq.format import BIT_WIDTHS, UsageError, pack
from vllm_moeq.kernels import PackedExperts, PackedMatrices, ReferenceLayer, make_layer, ragged
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.cpu.layer import ISA_VARIABLE, NativeLayer

pytestmark = [pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there"), pytest.mark.compiler]
LIMIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
"""Largest ‖difference‖ / ‖exact‖; those of 16 bits are the roundings of the result, which nobody can avoid."""


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def inputs(packed: PackedExperts, tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    experts = len(packed.bits)
    weights, ids = random_routing(tokens, experts, min(2, experts), seed=seed)
    x = torch.randn((tokens, packed.hidden), generator=torch.Generator().manual_seed(seed))
    return x.to(dtype), weights, ids


each_isa = pytest.mark.usefixtures("isa")


@each_isa
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("group_size", "offset"), [(32, 0), (64, 32), (128, 0), (128, 96), (96, 32), (-1, 0)])
@pytest.mark.parametrize("bits", [*[[width] for width in BIT_WIDTHS], [3, 1, 8, 2, 4]], ids=str)
def test_every_width_and_group_size(bits: list[int], group_size: int, offset: int, dtype: torch.dtype) -> None:
    """One token, few and many, with rows and columns that fill neither blocks of rows nor segments of columns."""
    packed = random_layer(bits, 288, 224, group_size, offset)
    kernel = NativeLayer(packed)
    for tokens in (1, 2, 5, 70):
        x, weights, ids = inputs(packed, tokens, dtype)
        found = kernel(x, weights, ids)
        assert found.dtype == dtype
        assert found.shape == x.shape
        assert difference(found, exact(packed, x, weights, ids)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
def test_agrees_with_the_reference(dtype: torch.dtype) -> None:
    packed = random_layer([2, 3, 1, 4, 8], 256, 128, 64)
    x, weights, ids = inputs(packed, 33, dtype)
    expected = ReferenceLayer(packed)(x, weights, ids).double()
    assert difference(NativeLayer(packed)(x, weights, ids), expected) < 1e-2


@each_isa
@pytest.mark.parametrize("routing", [*EDGE_ROUTINGS, "one slot"])
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_edge_routings(tokens: int, routing: str) -> None:
    packed = random_layer([1, 3, 2, 3], 128, 64, 64)
    x, weights, ids = inputs(packed, tokens, torch.float32)
    if routing == "one slot":
        weights, ids = weights[:, :1], ids[:, :1]
    else:
        weights, ids = edge_routing(routing, weights, ids)
    found = NativeLayer(packed)(x, weights, ids)
    skipped = (ids < 0).all(1)
    assert not found[skipped].any()
    if not skipped.all():
        assert difference(found, exact(packed, x, weights, ids)) < LIMIT[torch.float32]


@each_isa
def test_no_tokens() -> None:
    kernel = NativeLayer(random_layer([1, 3], 128, 64, 64))
    empty = torch.empty((0, 2))
    assert kernel(torch.empty((0, 128), dtype=torch.bfloat16), empty, empty.int()).shape == (0, 128)


@each_isa
def test_more_tokens_than_a_part() -> None:
    """Batches are computed 512 tokens at a time."""
    packed = random_layer([2, 3], 64, 32, 32)
    x, weights, ids = inputs(packed, 1025, torch.float32)
    assert difference(NativeLayer(packed)(x, weights, ids), exact(packed, x, weights, ids)) < LIMIT[torch.float32]


@each_isa
def test_float32_scales() -> None:
    """Scales that float16 cannot hold arrive as float32, of one projection or of both."""
    packed = random_layer([3, 1, 2], 128, 64, 64)
    for parts in ((True, True), (True, False), (False, True)):
        wide = [
            PackedMatrices(m.matrices, m.words, m.scales.float() * 2e-6, m.zeros.float()) if is_wide else m
            for m, is_wide in zip((packed.gate_up, packed.down), parts, strict=True)
        ]
        layer = PackedExperts(wide[0], wide[1])
        x, weights, ids = inputs(layer, 5, torch.float32)
        x *= 1e5
        assert difference(NativeLayer(layer)(x, weights, ids), exact(layer, x, weights, ids)) < LIMIT[torch.float32]


@each_isa
@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_vectors_read_out_the_weights_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    """Down's columns come out, rounded once."""
    size, group = 64, 32
    down = random_layer([bits], size, size, group).down
    codes = torch.ones(2 * size, size, dtype=torch.int64)  # gate adds all of x, the unit vector's one entry
    codes[size:] = torch.eye(size, dtype=torch.int64)  # up is the identity
    scales = torch.ones(1, 2 * size, size // group, dtype=torch.float16)
    matrices = ragged([bits], 2 * size, size, group)
    gate_up = PackedMatrices(matrices, pack(codes, bits).flatten(), scales, torch.zeros_like(scales))
    # silu(32) is 32 in float32: columns come out times 32 · 32, a power of two, which the routing weight takes away.
    x, weights = (32 * torch.eye(size)).to(dtype), torch.full((size, 1), 2.0**-10)
    found = NativeLayer(PackedExperts(gate_up, down))(x, weights, torch.zeros(size, 1, dtype=torch.int32))
    assert torch.equal(found, dense(down, 0).T.to(dtype))


@each_isa
def test_neither_threads_nor_other_tokens_change_a_result() -> None:
    packed = random_layer([2, 3, 1, 8], 256, 192, 64)
    check_same_bits(NativeLayer(packed), *inputs(packed, 40, torch.float32))


@each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(value: float) -> None:
    packed = random_layer([2, 3], 128, 64, 64)
    kernel = NativeLayer(packed)
    x, weights, ids = inputs(packed, 3, torch.bfloat16)
    before = kernel(x, weights, ids)
    x[1, 7] = value
    found = kernel(x, weights, ids)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], before[[0, 2]])


@each_isa
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e4])
def test_small_and_large_activations(factor: float) -> None:
    packed = random_layer([3, 2], 128, 64, 64)
    x, weights, ids = inputs(packed, 4, torch.float32)
    x *= factor
    expected = exact(packed, x, weights, ids)
    found = NativeLayer(packed)(x, weights, ids)
    assert found.isfinite().all()
    assert (found.double() - expected).norm() <= 1e-6 * expected.norm() + 1e-37


@each_isa
def test_outliers() -> None:
    """A few channels that are a thousand times the others', as models have them."""
    packed = random_layer([3, 2], 256, 128, 128)
    x, weights, ids = inputs(packed, 8, torch.float32)
    x[:, ::61] *= 1000
    expected = exact(packed, x.bfloat16(), weights, ids)
    assert difference(NativeLayer(packed)(x.bfloat16(), weights, ids), expected) < LIMIT[torch.bfloat16]


@each_isa
def test_other_layouts_of_the_inputs() -> None:
    packed = random_layer([3, 2], 128, 64, 64)
    x, weights, ids = inputs(packed, 6, torch.float16)
    expected = NativeLayer(packed)(x, weights, ids)
    wide = torch.cat([x, x], dim=1)[:, :128]
    found = NativeLayer(packed)(wide, weights.double().T.contiguous().T, ids.long())
    assert torch.equal(found, expected)


def test_an_expert_that_is_not_there_is_refused() -> None:
    packed = random_layer([3, 2], 128, 64, 64)
    x, weights, ids = inputs(packed, 2, torch.float32)
    ids[1, 0] = 2
    with pytest.raises(IndexError, match="not below the number of experts"):
        NativeLayer(packed)(x, weights, ids)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(UsageError, match=r"VLLM_MOEQ_CPU_ISA: expected one of scalar.*, found sse9"):
        make_layer(random_layer([3], 64, 32, 32), torch.float32, "native")


def test_traced_as_one_operator() -> None:
    packed = random_layer([3, 2], 128, 64, 64)
    kernel = NativeLayer(packed)
    compiled = torch.compile(lambda *each: kernel(*each) * 2, backend="aot_eager", fullgraph=True)
    for tokens in (3, 5):
        arguments = inputs(packed, tokens, torch.bfloat16)
        assert torch.equal(compiled(*arguments), kernel(*arguments) * 2)

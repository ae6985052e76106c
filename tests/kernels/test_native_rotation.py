"""Layers in a rotated basis in the native CPU kernel, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.layers import (
    EDGE_ROUTINGS,
    Coding,
    check_same_bits,
    edge_routing,
    exact,
    mixed_layer,
    random_routing,
)
from tests.kernels.rotations import Rotations, random_rotation, rank_s_part, rotated, turned
from vllm_moeq.format import GRID, TRELLIS_SCHEME, BlockRotation
from vllm_moeq.kernels import PackedExperts
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.cpu.layer import NativeLayer

pytestmark = [pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there"), pytest.mark.compiler]
LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
"""Largest ‖difference‖ / ‖exact‖."""
SIZES = (16, 32, 64, 128, 256)
HIDDEN, INTERMEDIATE = 512, 256
EXPERTS: list[Coding] = [(TRELLIS_SCHEME, 2), (GRID, 3), (TRELLIS_SCHEME, 3), (GRID, 2)]

each_isa = pytest.mark.usefixtures("isa")


def inputs(packed: PackedExperts, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    weights, ids = random_routing(tokens, len(packed.bits), 2)
    x = torch.randn((tokens, packed.hidden), generator=torch.Generator().manual_seed(0))
    return x.to(dtype), weights, ids


def check(
    packed: PackedExperts, rotations: Rotations, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> None:
    found = NativeLayer(turned(packed, rotations))(x, weights, ids)
    before_up = rotated(x, rotations.before_up)
    expected = exact(packed, before_up, weights, ids, lambda inner: rotated(inner, rotations.before_down))
    assert found.dtype == x.dtype
    assert not found[(ids < 0).all(1)].any()
    assert (found.double() - expected).norm() <= LIMIT[x.dtype] * expected.norm()


@each_isa
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", LIMIT)
def test_every_size(size: int, dtype: torch.dtype) -> None:
    packed = mixed_layer(EXPERTS, HIDDEN, INTERMEDIATE)
    both = Rotations(random_rotation(HIDDEN, size), random_rotation(INTERMEDIATE, size))
    for tokens in (1, 3, 70):
        check(packed, both, *inputs(packed, tokens, dtype))


@each_isa
@pytest.mark.parametrize("sizes", [(256, 16), (0, 64), (32, 0)], ids=str)
def test_either_may_be_missing_and_sizes_differ(sizes: tuple[int, int]) -> None:
    packed = mixed_layer(EXPERTS, HIDDEN, INTERMEDIATE)
    up, down = (
        random_rotation(columns, size) if size else None
        for columns, size in zip((HIDDEN, INTERMEDIATE), sizes, strict=True)
    )
    check(packed, Rotations(up, down), *inputs(packed, 5))


@each_isa
def test_a_rank_s_slice() -> None:
    """Its part of down begins inside a group of the grid, and has sizes that fill no segment."""
    packed = mixed_layer(EXPERTS, 96, 160, 128, 32)
    check(packed, Rotations(random_rotation(96, 32), random_rotation(160, 32)), *inputs(packed, 9))


@each_isa
def test_ranks_add_up_to_the_layer() -> None:
    """Two ranks hold half of the inner dimension each; down's columns are cut inside a group of the grid."""
    packed = mixed_layer(EXPERTS, 128, 192)
    before_up, before_down = random_rotation(128, 64), random_rotation(192, 32)
    x, weights, ids = inputs(packed, 9)
    total = torch.zeros(9, 128, dtype=torch.float64)
    for begin, end in ((0, 96), (96, 192)):
        own = PackedExperts(
            rank_s_part(packed.gate_up, [(begin, end), (192 + begin, 192 + end)], None),
            rank_s_part(packed.down, None, (begin, end)),
        )
        inner = BlockRotation(before_down.signs[begin // 32 : end // 32], before_down.size)
        total += NativeLayer(turned(own, Rotations(before_up, inner)))(x, weights, ids).double()
    whole = NativeLayer(turned(packed, Rotations(before_up, before_down)))(x, weights, ids).double()
    assert (total - whole).norm() <= 2 * LIMIT[torch.float32] * whole.norm()


@pytest.mark.parametrize("before_up", [None, random_rotation(128, 64)])
def test_torchs_default_dtype_changes_nothing(before_up: BlockRotation | None) -> None:
    """vLLM makes the model's dtype the default while it loads."""
    packed = mixed_layer(EXPERTS, 128, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel = NativeLayer(turned(packed, Rotations(before_up, random_rotation(64, 32))))
        plain = NativeLayer(packed)
    finally:
        torch.set_default_dtype(torch.float32)
    x, weights, ids = inputs(packed, 3)
    expected = NativeLayer(turned(packed, Rotations(before_up, random_rotation(64, 32))))(x, weights, ids)
    assert torch.equal(kernel(x, weights, ids), expected)
    assert torch.equal(plain(x, weights, ids), NativeLayer(packed)(x, weights, ids))


@each_isa
@pytest.mark.parametrize("routing", EDGE_ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_edge_routings(tokens: int, routing: str) -> None:
    packed = mixed_layer(EXPERTS, 128, 64)
    both = Rotations(random_rotation(128, 128), random_rotation(64, 64))
    x, weights, ids = inputs(packed, tokens)
    check(packed, both, x, *edge_routing(routing, weights, ids))
    assert NativeLayer(turned(packed, both))(x[:0], weights[:0], ids[:0]).shape == (0, 128)


@each_isa
def test_neither_threads_nor_other_tokens_change_a_result() -> None:
    packed = mixed_layer(EXPERTS, 256, 192)
    both = Rotations(random_rotation(256, 64), random_rotation(192, 64))
    check_same_bits(NativeLayer(turned(packed, both)), *inputs(packed, 21))


@each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(value: float) -> None:
    packed = mixed_layer(EXPERTS, 128, 64)
    kernel = NativeLayer(turned(packed, Rotations(random_rotation(128, 32), random_rotation(64, 16))))
    x, weights, ids = inputs(packed, 3, torch.bfloat16)
    before = kernel(x, weights, ids)
    x[1, 7] = value
    found = kernel(x, weights, ids)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], before[[0, 2]])


def test_factors_of_another_size_are_refused() -> None:
    packed = mixed_layer(EXPERTS, 128, 64)
    kernel = NativeLayer(turned(packed, Rotations(random_rotation(96, 32))))
    with pytest.raises(RuntimeError, match="expected 131 floats of a layer, found 99"):
        kernel(*inputs(packed, 1))


def test_traced_as_one_operator() -> None:
    packed = mixed_layer(EXPERTS, 128, 64)
    kernel = NativeLayer(turned(packed, Rotations(random_rotation(128, 32), random_rotation(64, 16))))
    compiled = torch.compile(lambda *each: kernel(*each) * 2, backend="aot_eager", fullgraph=True)
    arguments = inputs(packed, 3, torch.bfloat16)
    assert torch.equal(compiled(*arguments), kernel(*arguments) * 2)

"""Experts of the trellis in the native CPU kernel, alone and beside the grid's, against float64."""

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
from vllm_moeq.format import (
    CENTRE,
    GRID,
    ROW_SCALE,
    TRELLIS,
    TRELLIS_SCHEME,
    TRELLIS_WIDTHS,
    codes_of_states,
    trellis_codes,
)
from vllm_moeq.kernels import PackedExperts, PackedMatrices
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.cpu.layer import NativeLayer, repack

pytestmark = [pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there"), pytest.mark.compiler]
LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
"""Largest ‖difference‖ / ‖exact‖. One code of 64 × 64 that is wrong by 1 makes 1e-3. Codes lie about 63.25 and zeros at
it, so float32 loses a bit more than with the grid."""
ALL: list[Coding] = [(TRELLIS_SCHEME, bits) for bits in TRELLIS_WIDTHS]
MIXED: list[Coding] = [(GRID, 3), (TRELLIS_SCHEME, 2), (GRID, 8), (TRELLIS_SCHEME, 1), (TRELLIS_SCHEME, 3), (GRID, 2)]


def names(experts: list[Coding]) -> str | None:
    return "-".join(f"{scheme.name}{bits}" for scheme, bits in experts) if isinstance(experts, list) else None


each_isa = pytest.mark.usefixtures("isa")


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def inputs(packed: PackedExperts, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    experts = len(packed.bits)
    weights, ids = random_routing(tokens, experts, min(2, experts))
    x = torch.randn((tokens, packed.hidden), generator=torch.Generator().manual_seed(0))
    return x.to(dtype), weights, ids


@each_isa
@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_the_codes_are_the_format_s(bits: int) -> None:
    """Unit vectors give down · up; either factor's codes come out as integers once the other is divided away."""
    size = 64
    packed = mixed_layer([(TRELLIS_SCHEME, bits)], size, size)
    first, second = packed.gate_up, packed.down
    first.tensors[TRELLIS].view(2 * size, -1)[
        :size
    ] = -1  # a ring of ones has one code; silu is the identity far above 0
    scales = [part.tensors[ROW_SCALE].fill_(2.0**-5) for part in (first, second)]
    gate = (int(codes_of_states()[-1]) - CENTRE) * float(scales[0][0, 0])
    x = 64 / gate * torch.eye(size)
    found = NativeLayer(packed)(x, torch.full((size, 1), 1.0), torch.zeros(size, 1, dtype=torch.int32)).double()
    product = found.T / (64 * 64 / gate)
    codes = [trellis_codes(part.tensors[TRELLIS].view(part.matrices.rows, -1), bits) for part in (first, second)]
    up, down = ((each[-size:].double() - CENTRE) * 2.0**-5 for each in codes)
    for solved, expected in ((torch.linalg.solve(down, product), up), (torch.linalg.solve(up.T, product.T).T, down)):
        rounded = (solved / 2.0**-5 + CENTRE).round()
        assert torch.equal(rounded, (expected / 2.0**-5 + CENTRE))


@each_isa
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("experts", [*([each] for each in ALL), ALL, MIXED], ids=names)
def test_every_width(experts: list[Coding], dtype: torch.dtype) -> None:
    """One token, few and many, with columns that fill no segment."""
    packed = mixed_layer(experts, 288, 224)
    kernel = NativeLayer(packed)
    for tokens in (1, 2, 5, 70):
        x, weights, ids = inputs(packed, tokens, dtype)
        found = kernel(x, weights, ids)
        assert found.dtype == dtype
        assert difference(found, exact(packed, x, weights, ids)) < LIMIT[dtype]


@each_isa
@pytest.mark.parametrize(("group_size", "offset"), [(32, 0), (64, 32), (128, 96), (96, 32), (-1, 0)])
def test_the_grid_s_groups_do_not_matter(group_size: int, offset: int) -> None:
    """Ranks hold slices of down that begin anywhere in a group of the grid's experts."""
    for experts in (ALL, MIXED):
        packed = mixed_layer(experts, 256, 160, group_size, offset)
        x, weights, ids = inputs(packed, 9)
        assert difference(NativeLayer(packed)(x, weights, ids), exact(packed, x, weights, ids)) < LIMIT[torch.float32]


@each_isa
@pytest.mark.parametrize("routing", EDGE_ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_edge_routings(tokens: int, routing: str) -> None:
    packed = mixed_layer(MIXED, 128, 64, 64)
    x, weights, ids = inputs(packed, tokens)
    weights, ids = edge_routing(routing, weights, ids)
    found = NativeLayer(packed)(x, weights, ids)
    skipped = (ids < 0).all(1)
    assert not found[skipped].any()
    if not skipped.all():
        assert difference(found, exact(packed, x, weights, ids)) < LIMIT[torch.float32]
    assert NativeLayer(packed)(x[:0], weights[:0], ids[:0]).shape == (0, 128)


@each_isa
def test_neither_threads_nor_other_tokens_change_a_result() -> None:
    packed = mixed_layer(MIXED, 256, 192, 64)
    check_same_bits(NativeLayer(packed), *inputs(packed, 40))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", range(len(MIXED)))
def test_an_expert_s_tokens_may_be_of_any_number(expert: int, dtype: torch.dtype) -> None:
    """The kernel takes tokens in groups; each size has code of its own."""
    packed = mixed_layer(MIXED, 160, 64, 64)
    kernel = NativeLayer(packed)
    x = torch.randn((66, 160), generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, ids = torch.ones((66, 1)), torch.full((66, 1), expert, dtype=torch.int32)
    together = kernel(x, weights, ids)
    assert difference(together, exact(packed, x, weights, ids)) < LIMIT[dtype]
    for tokens in (*range(1, 26), 63, 64, 65):
        assert torch.equal(kernel(x[:tokens], weights[:tokens], ids[:tokens]), together[:tokens])


@each_isa
@pytest.mark.parametrize("experts", [ALL, MIXED], ids=["trellis", "mixed"])
def test_float32_scales(experts: list[Coding]) -> None:
    """A loader widens all scales of a projection if float16 cannot hold one."""
    layer = mixed_layer(experts, 128, 64, 64)
    wide = {ROW_SCALE: 2e-6, "weight_scale": 2e-6}

    def widened(part: PackedMatrices) -> PackedMatrices:
        tensors = (t.float() * wide.get(s, 1) if t.is_floating_point() else t for s, t in part.tensors.items())
        return PackedMatrices(part.matrices, *tensors)

    for packed in (
        PackedExperts(widened(layer.gate_up), widened(layer.down)),
        PackedExperts(widened(layer.gate_up), layer.down),
        PackedExperts(layer.gate_up, widened(layer.down)),
    ):
        x, weights, ids = inputs(packed, 5)
        x *= 1e5
        assert difference(NativeLayer(packed)(x, weights, ids), exact(packed, x, weights, ids)) < LIMIT[torch.float32]


def test_the_grid_s_experts_are_bit_identical_beside_a_trellis() -> None:
    """The grid's experts of a mixed layer compute as in a layer of their own."""
    packed = mixed_layer(MIXED, 256, 128, 64)
    alone = mixed_layer([each for each in MIXED if each[0] is GRID], 256, 128, 64)
    x, weights, _ = inputs(packed, 9)
    places = [place for place, (scheme, _) in enumerate(MIXED) if scheme is GRID]
    for index, place in enumerate(places):
        mixed, own = (torch.full((9, 1), it, dtype=torch.int32) for it in (place, index))
        assert torch.equal(NativeLayer(packed)(x, weights[:, :1], mixed), NativeLayer(alone)(x, weights[:, :1], own))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("experts", [ALL, MIXED], ids=["trellis", "mixed"])
def test_repacked_size_is_the_format_s(experts: list[Coding], gated: bool) -> None:
    layer = mixed_layer(experts, 256, 128)
    part = layer.gate_up if gated else layer.down
    data, _ = repack(part, gated=gated)
    assert data.nbytes == sum(tensor.nbytes for tensor in part.tensors.values())

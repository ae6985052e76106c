"""Trellises and rotated layers in the fused kernels, alone and beside the grid, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.layers import (
    EDGE_ROUTINGS,
    Coding,
    dense,
    edge_routing,
    exact,
    mixed_layer,
    mixed_matrices,
    random_routing,
)
from tests.kernels.rotations import Rotations, random_rotation, rank_s_part, rotated, turned
from tests.tiers import thorough, thorough_rows
from vllm_moeq.format import GRID, ROW_SCALE, SCALE, TRELLIS_SCHEME, TRELLIS_WIDTHS, BlockRotation
from vllm_moeq.format.rotation import ROTATION_SIZES
from vllm_moeq.kernels import PackedExperts, PackedMatrices
from vllm_moeq.kernels.triton import inputs as inputs_module
from vllm_moeq.kernels.triton import layer as layer_module
from vllm_moeq.kernels.triton.layer import Tokens, TritonLayer
from vllm_moeq.kernels.triton.repack import repack
from vllm_moeq.kernels.triton.schedule import FEW, FEW_TOKENS, MANY, schedule_many

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 2e-2}
"""Largest ‖difference‖ / ‖exact‖. Under the interpreter, which truncates, bfloat16 loses twice as much as on a GPU."""
ALL: list[Coding] = [(TRELLIS_SCHEME, bits) for bits in TRELLIS_WIDTHS]
MIXED: list[Coding] = [(GRID, 3), (TRELLIS_SCHEME, 2), (GRID, 8), (TRELLIS_SCHEME, 1), (TRELLIS_SCHEME, 3), (GRID, 2)]
FOUR: list[Coding] = [(TRELLIS_SCHEME, 2), (GRID, 3), (TRELLIS_SCHEME, 3), (GRID, 2)]
"""What a plan makes: two trellises, and the widths that have none."""
GRIDS: list[Coding] = [(GRID, 2), (GRID, 3)]
ROTATED_CASES = list(itertools.product([ALL, FOUR, GRIDS], [(256, 16), (0, 64), (32, 0), (128, 64)]))


def name(value: object) -> str | None:
    """Return the id of a list of experts; other parameters have pytest's own."""
    return "-".join(f"{scheme.name}{bits}" for scheme, bits in value) if isinstance(value, list) else None


pytestmark = [pytest.mark.slow, *([pytest.mark.gpu] if GPU else [])]


def placed(part: PackedMatrices) -> PackedMatrices:
    """Return the matrices on the device that runs the kernels."""
    tensors = (tensor.to(DEVICE) for tensor in part.tensors.values())
    return PackedMatrices(part.matrices, *tensors, rotation=part.rotation)


def layer_of(packed: PackedExperts) -> TritonLayer:
    return TritonLayer(PackedExperts(placed(packed.gate_up), placed(packed.down)))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


def check(
    packed: PackedExperts,
    dtype: torch.dtype,
    weights: torch.Tensor,
    ids: torch.Tensor,
    rotations: Rotations | None = None,
) -> None:
    """Compare the layer with float64 on random tokens."""
    rotations = rotations or Rotations()
    x = torch.randn((len(ids), packed.hidden), generator=torch.Generator().manual_seed(3)).to(dtype)
    found = layer_of(turned(packed, rotations))(x.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE))
    before_up = rotated(x, rotations.before_up)
    expected = exact(packed, before_up, weights, ids, lambda inner: rotated(inner, rotations.before_down))
    skipped = (ids < 0).all(1)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert not found.cpu()[skipped].any()
    if not skipped.all():
        assert difference(found, expected) < TOLERANCE[dtype]


def project(layer: TritonLayer, x: torch.Tensor, ids: torch.Tensor, *, gated: bool) -> torch.Tensor:
    """Return one projection of tokens with one expert each, float32 from down and x's dtype from gate and up."""
    matrices, prepared = (layer.gate_up, layer.before_up) if gated else (layer.down, layer.before_down)
    routing = Tokens(ids, torch.ones(len(ids), device=DEVICE), 1)
    few, lookup = len(ids) <= FEW_TOKENS, None
    schedule = layer.schedule_few(len(ids)) if few else schedule_many(len(ids), len(layer.bits))
    if few:
        lookup = layer.with_records(routing, schedule, 1)
    else:
        routing.order, routing.counts = layer._sort(routing)
    shape = (len(ids), matrices.rows // 2) if gated else (1, len(ids), matrices.rows)
    out = torch.full(shape, float("nan"), device=DEVICE, dtype=x.dtype if gated else torch.float32)
    layer.project(
        matrices,
        prepared(x, few, lookup=lookup),
        routing,
        schedule,
        out,
        activation=layer.activation if gated else None,
    )
    return out.view(len(ids), -1)


CASES = list(itertools.product([1, 16, 65], DTYPES, ["all", "mixed"], [288, 512]))
EVERY_RUN = [(16, torch.float16, "mixed", 288), (65, torch.bfloat16, "all", 512)]


@pytest.mark.parametrize(("tokens", "dtype", "experts", "columns"), thorough_rows(CASES, EVERY_RUN), ids=str)
def test_identity_returns_the_weights(tokens: int, dtype: torch.dtype, experts: str, columns: int) -> None:
    """Rows of the identity matrix pick columns: (code − 63.25)·scale bit for bit, for every width."""
    packed = mixed_matrices(ALL if experts == "all" else MIXED, 96, columns, 128)
    layer = layer_of(PackedExperts(packed, packed))
    picked = torch.arange(tokens) * 37 % columns
    ids = torch.arange(tokens, dtype=torch.int32) % len(packed.matrices.bits)
    found = project(layer, torch.eye(columns)[picked].to(DEVICE, dtype), ids.to(DEVICE), gated=False)
    expected = torch.stack([dense(packed, int(ids[t]))[:, picked[t]] for t in range(tokens)])
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_every_column_of_gate_and_up(bits: int) -> None:
    """Rings run through rows of gate, or of up, which alternate by eight. A wrong code changes a value by 1%."""
    columns, neurons = 64, 96
    packed = mixed_matrices([(TRELLIS_SCHEME, bits)], 2 * neurons, columns, -1)
    layer = layer_of(PackedExperts(packed, packed))
    ids = torch.zeros(columns, dtype=torch.int32, device=DEVICE)
    found = project(layer, torch.eye(columns).half().to(DEVICE), ids, gated=True)
    gate, up = dense(packed, 0).T.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    assert torch.allclose(found.cpu().double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "tokens", "dtype"),
    thorough_rows(
        itertools.product([ALL, MIXED], [1, 9, 16, 17, 70], DTYPES),
        [(ALL, 9, torch.bfloat16), (MIXED, 9, torch.float16), (MIXED, 70, torch.bfloat16)],
    ),
    ids=name,
)
def test_layer_agrees_with_float64(experts: list[Coding], tokens: int, dtype: torch.dtype) -> None:
    """Columns and neurons fill no block."""
    packed = mixed_layer(experts, 288, 96, 32)
    check(packed, dtype, *random_routing(tokens, len(experts), 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ROTATION_SIZES)
@pytest.mark.parametrize("experts", [ALL, FOUR, GRIDS], ids=name)
def test_every_size_of_rotation(size: int, dtype: torch.dtype, experts: list[Coding]) -> None:
    """What a projection reads: rotated rows in both orders of columns, zeros behind them, and sums."""
    columns, groups = 768, 0 if experts is ALL else 2
    rotation = random_rotation(columns, size)
    matrices = mixed_matrices(experts, 64, columns, 128)
    packed = PackedMatrices(matrices.matrices, *matrices.tensors.values(), rotation=rotation)
    prepared = TritonLayer(PackedExperts(placed(packed), placed(packed))).before_down
    x = torch.randn((3, columns), generator=torch.Generator().manual_seed(size)).to(dtype)
    found = prepared(x.to(DEVICE), False)
    expected = rotated(x, rotation)
    plain = [] if experts is ALL else [expected]
    rings = [] if experts is GRIDS else [expected.view(3, 3, 16, 16).transpose(2, 3).flatten(1)]
    step = 2.0 ** -(10 if dtype == torch.float16 else 7)
    assert torch.allclose(found.x.cpu().double(), torch.stack(plain + rings), rtol=step, atol=1e-6)
    sums = found.x[0].cpu().double().view(3, 3 * max(groups, 1), -1).sum(-1)
    assert torch.allclose(found.sums.cpu().double(), sums, rtol=1e-5, atol=1e-4)
    few = prepared(x.to(DEVICE), True)
    assert torch.equal(few.x, found.x)
    chunks = few.sums.cpu().double()  # of a pair of fields, where codes are spread
    assert chunks.shape[1] == (3 if experts is ALL else columns // 32)
    assert torch.allclose(chunks.view(*sums.shape, -1).sum(-1), sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("experts", "sizes"), thorough_rows(ROTATED_CASES, [(ALL, (256, 16)), (FOUR, (0, 64)), (GRIDS, (32, 0))]), ids=name
)
def test_either_may_be_missing_and_sizes_differ(experts: list[Coding], sizes: tuple[int, int]) -> None:
    up, down = (
        random_rotation(columns, size) if size else None for columns, size in zip((256, 192), sizes, strict=True)
    )
    check(mixed_layer(experts, 256, 192), torch.float16, *random_routing(5, len(experts), 2), Rotations(up, down))


@pytest.mark.parametrize("tokens", thorough([1, 5, 16, 17, 40], [5, 17]))
@pytest.mark.parametrize("routing", EDGE_ROUTINGS)
def test_edge_routing(tokens: int, routing: str) -> None:
    packed = mixed_layer(FOUR, 128, 64, 64)
    both = Rotations(random_rotation(128, 128), random_rotation(64, 32))
    check(packed, torch.float16, *edge_routing(routing, *random_routing(tokens, 4, 2)), both)


def test_no_tokens() -> None:
    layer = layer_of(turned(mixed_layer(FOUR, 128, 64), Rotations(random_rotation(128, 32), None)))
    empty = torch.empty((0, 2), device=DEVICE)
    assert layer(torch.empty((0, 128), dtype=torch.float16, device=DEVICE), empty, empty.int()).shape == (0, 128)


def test_torchs_default_dtype_changes_nothing() -> None:
    """vLLM makes the model's dtype the default while it loads."""
    packed = turned(mixed_layer(FOUR[:2], 64, 32), Rotations(random_rotation(64, 32), random_rotation(32, 16)))
    x = torch.randn((2, 64), generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    weights, ids = (tensor.to(DEVICE) for tensor in random_routing(2, 2, 1))
    expected = layer_of(packed)(x, weights, ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = layer_of(packed)(x, weights, ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("schedule", [*FEW, *MANY], ids=str)
def test_every_schedule(schedule: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "schedule_few", lambda *_: schedule)
    monkeypatch.setattr(layer_module, "schedule_many", lambda *_: schedule)
    packed = mixed_layer([(TRELLIS_SCHEME, 3), (GRID, 2)], 128, 128)
    check(packed, torch.float16, *random_routing(7 if schedule in FEW else 40, 2, 1))


@pytest.mark.parametrize("splits", thorough([2, 4, 8], [4]))
def test_splitting_the_input_dimension(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonLayer, "_splits", lambda *_: splits)
    both = Rotations(random_rotation(128, 128), random_rotation(640, 128))
    check(mixed_layer(FOUR[:2], 128, 640), torch.float16, *random_routing(2, 2, 2), both)


@pytest.mark.parametrize("tokens", thorough([9, 20], [9]))
def test_ranks_add_up_to_the_layer(tokens: int) -> None:
    """Two ranks hold half of the inner dimension each; down's columns are cut inside a group of the grid."""
    packed = mixed_layer(FOUR, 128, 192)
    before_up, before_down = random_rotation(128, 64), random_rotation(192, 32)
    weights, ids = random_routing(tokens, 4, 2)
    x = torch.randn((tokens, 128), generator=torch.Generator().manual_seed(0)).half()
    total = torch.zeros(tokens, 128, dtype=torch.float64)
    for begin, end in ((0, 96), (96, 192)):
        own = PackedExperts(
            rank_s_part(packed.gate_up, [(begin, end), (192 + begin, 192 + end)], None),
            rank_s_part(packed.down, None, (begin, end)),
        )
        inner = BlockRotation(before_down.signs[begin // 32 : end // 32], before_down.size)
        layer = layer_of(turned(own, Rotations(before_up, inner)))
        total += layer(x.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE)).cpu().double()
    expected = exact(packed, rotated(x, before_up), weights, ids, lambda inner: rotated(inner, before_down))
    assert difference(total, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("experts", [ALL, MIXED], ids=name)
def test_float32_scales(experts: list[Coding]) -> None:
    """A loader widens all scales of a projection if float16 cannot hold one."""
    layer = mixed_layer(experts, 128, 64, 64)

    def widened(part: PackedMatrices) -> PackedMatrices:
        tiny = {ROW_SCALE: 2e-6, SCALE: 2e-6}
        tensors = (t.float() * tiny.get(s, 1) if t.is_floating_point() else t for s, t in part.tensors.items())
        return PackedMatrices(part.matrices, *tensors)

    packed = PackedExperts(widened(layer.gate_up), layer.down)
    check(packed, torch.bfloat16, *random_routing(5, len(experts), 2))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("experts", [ALL, MIXED], ids=name)
@pytest.mark.parametrize("lanes", [16, 32])
def test_repacked_size_is_the_format_s(experts: list[Coding], gated: bool, lanes: int) -> None:
    """Besides, each row of a trellis has the zero that stands for its centre."""
    packed = mixed_layer(experts, 1024, 512)
    part = packed.gate_up if gated else packed.down
    repacked = repack(part, gated=gated, lanes=lanes)
    zeros = sum(scheme is TRELLIS_SCHEME for scheme, _ in experts) * part.matrices.rows * 2
    assert repacked.words.nbytes + repacked.scales.nbytes == sum(it.nbytes for it in part.tensors.values()) + zeros


@pytest.mark.parametrize(
    ("experts", "rotations", "few"),
    [
        (GRIDS, Rotations(), ["column_sums", "few_tokens", "few_tokens", "reduce_pairs"]),
        (FOUR, Rotations(random_rotation(128, 32), random_rotation(64, 32)),
         ["arrange", "few_tokens", "arrange", "few_tokens", "reduce_pairs"]),
    ], ids=["grid", "trellis"],
)  # fmt: skip
def test_launches(experts: list[Coding], rotations: Rotations, few: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its codings, a layer has one launch per projection; a rotation adds one, between the projections."""
    launches: list[str] = []
    interpreted = layer_module.interpreted()
    monkeypatch.setattr(layer_module, "interpreted", lambda: interpreted)

    class Counted:
        def __init__(self, kernel: object, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: object) -> object:
            launches.append(self.name)
            return self.kernel[grid]  # type: ignore[index]

    for module, names in (
        (layer_module, ("few_tokens", "many_tokens", "sort_pairs", "reduce_pairs")),
        (inputs_module, ("column_sums", "arrange")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    packed = turned(mixed_layer(experts, 128, 64), rotations)
    layer = layer_of(packed)
    for tokens in (1, 20):
        weights, ids = random_routing(tokens, len(experts), 2)
        layer(torch.zeros((tokens, 128), dtype=torch.float16, device=DEVICE), weights.to(DEVICE), ids.to(DEVICE))
    many = [name.replace("few", "many") for name in few]
    assert launches == [*few, "sort_pairs", *many]

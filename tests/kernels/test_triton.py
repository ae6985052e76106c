"""The fused kernels: under Triton's interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.layers import (
    EDGE_ROUTINGS,
    dense,
    edge_routing,
    exact,
    random_layer,
    random_matrices,
    random_routing,
)
from tests.tiers import thorough, thorough_rows
from vllm_moeq.format import BIT_WIDTHS
from vllm_moeq.kernels import PackedExperts, PackedMatrices, moe_reference
from vllm_moeq.kernels.triton.layer import Tokens, TritonLayer
from vllm_moeq.kernels.triton.repack import repack
from vllm_moeq.kernels.triton.schedule import (
    FEW,
    FEW_TOKENS,
    MANY,
    SHARED_BYTES,
    SHARED_BYTES_AMD,
    Block,
    schedule_few,
    schedule_many,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = list(itertools.product([1, 3, 16, 65], [32, 64, 128, -1], DTYPES))
EVERY_RUN = [(3, -1, torch.float16), (65, 64, torch.bfloat16)]
pytestmark = [pytest.mark.slow, *([pytest.mark.gpu] if GPU else [])]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def run(
    packed: PackedExperts, dtype: torch.dtype, weights: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the kernel's result and the exact one."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((ids.shape[0], packed.hidden), generator=generator).to(DEVICE, dtype)
    weights, ids = weights.to(DEVICE), ids.to(DEVICE)
    return TritonLayer(packed)(x, weights, ids), exact(packed, x, weights, ids)


@pytest.mark.parametrize(("tokens", "group_size", "dtype"), thorough_rows(CASES, EVERY_RUN), ids=str)
def test_identity_returns_the_weights(tokens: int, group_size: int, dtype: torch.dtype) -> None:
    """Rows of the identity matrix pick columns: (q − zero)·scale bit for bit, for every width."""
    bits, columns, rows = BIT_WIDTHS, 384, 64
    packed = random_matrices(bits, rows, columns, group_size, device=DEVICE)
    layer = TritonLayer(PackedExperts(packed, packed))
    picked = torch.randperm(columns, generator=torch.Generator().manual_seed(tokens))[:tokens]
    x = torch.eye(columns)[picked].to(DEVICE, dtype)
    ids = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % len(bits)
    routing = Tokens(ids, torch.ones(tokens, device=DEVICE), 1)
    few, lookup = tokens <= FEW_TOKENS, None
    schedule = layer.schedule_few(tokens) if few else schedule_many(tokens, len(bits))
    if few:
        lookup = layer.with_records(routing, schedule, 1)
    else:
        routing.order, routing.counts = layer._sort(routing)
    out = torch.full((1, tokens, rows), float("nan"), device=DEVICE)
    layer.project(layer.down, layer.before_down(x, few, lookup=lookup), routing, schedule, out)
    expected = torch.stack([dense(packed, int(ids[t]))[:, picked[t]] for t in range(tokens)])
    assert torch.equal(out[0], expected)


@pytest.mark.parametrize(("tokens", "group_size", "dtype"), thorough_rows(CASES, EVERY_RUN), ids=str)
def test_layer_agrees_with_float64(tokens: int, group_size: int, dtype: torch.dtype) -> None:
    packed = random_layer(BIT_WIDTHS, 256, 128, group_size, device=DEVICE)
    found, expected = run(packed, dtype, *random_routing(tokens, len(BIT_WIDTHS), 2))
    assert found.dtype == dtype
    assert difference(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "bits", [*([width] * 3 for width in BIT_WIDTHS), [2, 3, 3], [1, 2, 3, 3], [4, 3], [2, 4, 8]], ids=str
)
@pytest.mark.parametrize("tokens", [2, 33])
def test_every_width_and_mix(bits: list[int], tokens: int) -> None:
    packed = random_layer(bits, 128, 128, 128, device=DEVICE)
    found, expected = run(packed, torch.float16, *random_routing(tokens, len(bits), 2))
    assert difference(found, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("group_size", "offset", "intermediate"), [(128, 64, 192), (128, 96, 160), (64, 32, 96), (-1, 0, 96)]
)
@pytest.mark.parametrize("tokens", [3, 40])
def test_slices_of_tensor_parallelism(group_size: int, offset: int, intermediate: int, tokens: int) -> None:
    packed = random_layer([3, 1, 8, 2], 128, intermediate, group_size, offset, device=DEVICE)
    found, expected = run(packed, torch.float16, *random_routing(tokens, 4, 2))
    assert difference(found, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("tokens", thorough([1, 5, 16, 17, 40], [5, 17]))
@pytest.mark.parametrize("routing", EDGE_ROUTINGS)
def test_edge_routing(tokens: int, routing: str) -> None:
    packed = random_layer([1, 3, 2, 3], 128, 64, 64, device=DEVICE)
    weights, ids = random_routing(tokens, 4, 2)
    weights, ids = edge_routing(routing, weights, ids)
    found, expected = run(packed, torch.float16, weights, ids)
    skipped = (ids < 0).all(1)
    assert not found[skipped.to(DEVICE)].any()
    assert found.isfinite().all()
    if not skipped.all():
        assert difference(found, expected) < TOLERANCE[torch.float16]


def test_no_tokens() -> None:
    layer = TritonLayer(random_layer([1, 3], 128, 64, 64, device=DEVICE))
    x = torch.empty((0, 128), dtype=torch.float16, device=DEVICE)
    empty = torch.empty((0, 2), device=DEVICE)
    assert layer(x, empty, empty.int()).shape == (0, 128)


@pytest.mark.parametrize("schedule", [*FEW, *MANY], ids=str)
def test_every_schedule(schedule: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of tokens a schedule is meant for, it is right for any."""
    import vllm_moeq.kernels.triton.layer as module

    monkeypatch.setattr(module, "schedule_few", lambda *_: schedule)
    monkeypatch.setattr(module, "schedule_many", lambda *_: schedule)
    packed = random_layer([3, 2, 8, 1], 128, 128, 128, device=DEVICE)
    found, expected = run(packed, torch.float16, *random_routing(7 if schedule in FEW else 90, 4, 2))
    assert difference(found, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("splits", thorough([1, 2, 4, 8], [4]))
def test_splitting_the_input_dimension(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_layer([8, 1, 3, 2], 128, 640, 128, device=DEVICE)
    monkeypatch.setattr(TritonLayer, "_splits", lambda *_: splits)
    found, expected = run(packed, torch.float16, *random_routing(4, 4, 2))
    assert difference(found, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(("bits", "hidden"), [([3, 1], 1024), ([3, 1], 1088), ([2, 1], 3328), ([4, 2], 1280)], ids=str)
def test_slices_share_the_blocks_of_the_inputs(bits: list[int], hidden: int) -> None:
    """A block for each slice; some have one or three more, the last of which may be cut off."""
    found, expected = run(random_layer(bits, hidden, 64, 64, device=DEVICE), torch.float16, *random_routing(3, 2, 2))
    assert difference(found, expected) < TOLERANCE[torch.float16]


def test_slices_of_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonLayer, "_splits", lambda *_: 2)
    packed = random_layer([3, 1], 64, 4608, 64, device=DEVICE)
    found, expected = run(packed, torch.float16, *random_routing(1, 2, 2))
    assert difference(found, expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("tokens", [5, 16])
def test_a_token_may_choose_one_expert_twice(tokens: int) -> None:
    """An expert then has more pairs than one program takes."""
    packed = random_layer([3], 128, 64, 64, device=DEVICE)
    weights, ids = torch.rand(tokens, 2), torch.zeros((tokens, 2), dtype=torch.int32)
    found, expected = run(packed, torch.float16, weights, ids)
    assert difference(found, expected) < TOLERANCE[torch.float16]


def test_buffers_fit_into_shared_memory() -> None:
    """Widths, scales and the GPU decide; groups of 32 with float32 scales would take 114 KiB with four slices."""
    slices = [
        tuple(schedule_few(5, Block(3, scales), shared).slices for shared in (SHARED_BYTES, SHARED_BYTES_AMD))
        for scales in (0, 8, 64)
    ]
    assert slices == [(4, 2), (4, 2), (2, 1)]
    for block in (Block(planes, scales) for planes in range(1, 9) for scales in (0, 8, 32, 64)):
        for tokens in (1, 16):
            assert block.shared_bytes(schedule_few(tokens, block)) <= SHARED_BYTES


def test_float32_scales() -> None:
    """Scales that float16 cannot hold arrive as float32."""
    packed = random_layer([3, 1, 2], 128, 64, 64, device=DEVICE)
    tiny = [
        PackedMatrices(m.matrices, m.words, m.scales.float() * 2e-6, m.zeros.float())
        for m in (packed.gate_up, packed.down)
    ]
    found, expected = run(PackedExperts(tiny[0], tiny[1]), torch.bfloat16, *random_routing(4, 3, 2))
    assert difference(found, expected) < TOLERANCE[torch.bfloat16]


def test_agrees_with_the_reference_kernel() -> None:
    packed = random_layer([3, 2, 1, 3], 128, 128, 128, device=DEVICE)
    weights, ids = (tensor.to(DEVICE) for tensor in random_routing(9, 4, 2))
    x = torch.randn((9, 128), generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    expected = moe_reference(x, weights, ids, packed)
    assert difference(TritonLayer(packed)(x, weights, ids), expected.double()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("lanes", [16, 32])
def test_repacked_size_is_the_format_s(lanes: int) -> None:
    """No bit is added where the shape needs no padding."""
    packed = random_matrices([1, 2, 3, 4, 8], 128, 1024, 128)
    repacked = repack(packed, gated=False, lanes=lanes)
    assert repacked.words.nbytes == packed.words.nbytes
    assert repacked.scales.nbytes == packed.scales.nbytes + packed.zeros.nbytes


def test_warm_up_covers_every_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[object] = set()
    for bits in ([2, 3] * 4, [2, 4] * 4, [2, 8] * 4):
        seen: set[object] = set()
        monkeypatch.setattr(TritonLayer, "project", lambda *arguments, seen=seen, **_: seen.add(arguments[4]))
        layer = TritonLayer(random_layer(bits, 128, 64, 64, device=DEVICE))
        layer.warm_up(torch.float16, 2)
        assert seen == {*map(layer.schedule_few, range(1, FEW_TOKENS + 1)), *MANY}
        met |= seen
    assert met == {*FEW, *MANY}


def test_warm_up_meets_every_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_moeq.kernels.triton.layer.PROGRAMS", 16)
    layer = TritonLayer(random_layer([2, 3, 1, 3], 256, 1024, 64, device=DEVICE))
    sizes = [size for size in layer.warm_up_sizes(2) if size <= FEW_TOKENS]
    warm, needed = (
        {(layer.schedule_few(size), layer._splits(2 * size)) for size in each}
        for each in (sizes, range(1, FEW_TOKENS + 1))
    )
    assert warm == needed
    assert len({splits for _, splits in needed}) > 1


@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_graph_replays_with_new_routing(tokens: int) -> None:
    packed = random_layer([3, 2, 1, 3], 256, 128, 128, device=DEVICE)
    layer = TritonLayer(packed)
    layer.warm_up(torch.bfloat16, 2)
    x = torch.zeros((tokens, 256), dtype=torch.bfloat16, device=DEVICE)
    weights, ids = (tensor.to(DEVICE) for tensor in random_routing(tokens, 4, 2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, weights, ids)
    for seed in range(1, 4):
        new_weights, new_ids = random_routing(tokens, 4, 2, seed=seed)
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        weights.copy_(new_weights)
        ids.copy_(new_ids)
        graph.replay()
        assert difference(out, exact(packed, x, weights, ids)) < TOLERANCE[torch.bfloat16]

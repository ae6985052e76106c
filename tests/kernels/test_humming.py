from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from vllm_moeq.format import BIT_WIDTHS, UsageError, pack, unpack
from vllm_moeq.kernels import dense_expert, humming, moe_reference, ragged
from vllm_moeq.kernels.interface import PackedExperts, PackedMatrices

HIDDEN, INTERMEDIATE = 128, 192
MIXED = [8, 1, 3, 3, 2, 1, 4, 2]
MIXES = [*([b] * 4 for b in BIT_WIDTHS), MIXED, [4]]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2}


def matrices(
    bits: Sequence[int], rows: int, columns: int, group_size: int, offset: int = 0, device: str = "cpu"
) -> PackedMatrices:
    layout = ragged(bits, rows, columns, group_size, offset)
    generator = torch.Generator().manual_seed(rows + columns + offset)
    words = [pack(torch.randint(0, 2**b, (rows, columns), generator=generator), b).flatten() for b in bits]
    steps = torch.tensor([2.0**b - 1 for b in bits])[:, None, None]
    shape = (len(bits), rows, layout.groups)
    scales = ((0.5 + torch.rand(shape, generator=generator)) * 0.2 / steps).half()
    zeros = ((0.3 + 0.4 * torch.rand(shape, generator=generator)) * steps).half()
    return PackedMatrices(layout, torch.cat(words).to(device), scales.to(device), zeros.to(device))


def layer(
    bits: Sequence[int],
    group_size: int = 64,
    offset: int = 0,
    sizes: tuple[int, int] = (HIDDEN, INTERMEDIATE),
    device: str = "cpu",
) -> PackedExperts:
    hidden, intermediate = sizes
    gate_up = matrices(bits, 2 * intermediate, hidden, group_size, device=device)
    return PackedExperts(gate_up, matrices(bits, hidden, intermediate, group_size, offset, device))


def routing(name: str, experts: int, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if name == "one token":
        return torch.rand(1, experts, generator=generator).topk(top_k)[1].int()
    if name == "all on one expert":
        return torch.full((19, top_k), experts - 1, dtype=torch.int32)
    ids = torch.rand(37, experts, generator=generator).topk(top_k)[1]
    if name == "padding rows":
        ids[5:20] = -1
        ids[30, 0] = -1
    return ids.int()


ROUTINGS = ["one token", "all on one expert", "padding rows", "random"]


def inputs(ids: torch.Tensor, dtype: torch.dtype, hidden: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(ids.shape[0], hidden, generator=generator).to(dtype)
    return x, torch.rand(ids.shape, generator=generator)


def reference(experts: PackedExperts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return moe_reference(x, weights, ids, experts)


def assert_near(found: torch.Tensor, expected: torch.Tensor, ids: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.all(found[(ids < 0).all(1)] == 0)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < TOLERANCE[found.dtype]


def rounded_weights(packed: PackedMatrices, experts: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What humming multiplies with: (q − zero)·scale, every step in the activations' dtype."""
    tensors = humming.class_tensors(packed, experts, dtype)
    columns = packed.matrices.columns
    codes = unpack(tensors["weight"], packed.matrices.bits[experts[0]], columns).to(dtype)
    scale, zero = (
        tensors[name].repeat_interleave(columns // tensors[name].shape[2], dim=2)
        for name in ("weight_scale", "zero_point")
    )
    return (codes - zero) * scale


class CpuGemm:
    """Reads blocks as humming's indexed kernel does; rows that it does not write keep what they held."""

    def __init__(self, packed: PackedMatrices, experts: Sequence[int], dtype: torch.dtype) -> None:
        self.weights = rounded_weights(packed, experts, dtype).float()
        self.smallest = 8 if packed.matrices.rows > HIDDEN else 16
        self.told: list[int] = []

    def block_size(self, rows: int) -> int:
        return self.smallest if rows <= 16 else 24

    def regimes(self) -> list[int]:
        return [16, 1 << 30]

    def __call__(
        self, inputs: torch.Tensor, outputs: torch.Tensor, blocks: humming.Blocks, top_k: int, rows: int
    ) -> None:
        sorted_ids, owners, count = blocks
        assert {t.dtype for t in blocks} == {torch.int32}
        assert outputs.shape == (inputs.shape[0] * top_k, self.weights.shape[1])
        self.told.append(rows)
        size, seen = self.block_size(rows), set()
        for begin in range(0, int(count), size):
            for pair in sorted_ids[begin : begin + size].tolist():
                if pair < outputs.shape[0]:
                    assert pair not in seen
                    seen.add(pair)
                    outputs[pair] = self.weights[owners[begin // size]] @ inputs[pair // top_k].float()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the GEMMs, and make every buffer start as NaN."""
    monkeypatch.setattr(humming, "available", lambda: True)
    monkeypatch.setattr(humming, "IndexedGemm", CpuGemm)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: torch.full(shape, torch.nan, dtype=self.dtype))


def test_import_needs_neither_humming_nor_vllm() -> None:
    code = (
        "import sys, vllm_moeq.kernels.humming as h; "
        "assert not {'humming', 'vllm'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_is_unavailable() -> None:
    assert not humming.available()
    with pytest.raises(UsageError, match="CUDA GPU"):
        humming.HummingLayer(layer(MIXED))


def test_classes_and_their_maps_cover_every_expert_once() -> None:
    classes = humming.width_classes(MIXED)
    assert classes == {1: [1, 5], 2: [4, 7], 3: [2, 3], 4: [6], 8: [0]}
    maps = {bits: humming.expert_map(own, len(MIXED), torch.device("cpu")) for bits, own in classes.items()}
    assert maps[1].tolist() == [-1, 0, -1, -1, -1, 1, -1, -1, -1]
    assert torch.stack([(table >= 0).int() for table in maps.values()]).sum(dim=0).tolist() == [1] * len(MIXED) + [0]


@pytest.mark.parametrize(
    ("columns", "group_size", "offset", "expected"),
    [
        (2048, 32, 0, 32),
        (2048, 64, 0, 64),
        (2048, 128, 0, 128),
        (2048, -1, 0, 0),
        (2048, 512, 0, 128),
        (192, 96, 0, 32),
        (192, 128, 0, 64),
        (192, 128, 64, 64),
        (96, 128, 96, 32),
        (64, 128, 64, 0),
    ],
)
def test_groups_for_humming(columns: int, group_size: int, offset: int, expected: int) -> None:
    assert humming.common_group(ragged([4], 64, columns, group_size, offset)) == expected


def test_slices_within_32_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="begin 16 into a group of 128"):
        humming.common_group(ragged([4], 64, 128, 128, 16))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize(("group_size", "offset"), [(32, 0), (64, 0), (128, 0), (-1, 0), (128, 64), (96, 32)])
def test_class_tensors_are_the_same_weights(bits: int, group_size: int, offset: int) -> None:
    packed = matrices([2, bits, 8, bits], 64, 192, group_size, offset)
    members = humming.width_classes(packed.matrices.bits)[bits]
    tensors = humming.class_tensors(packed, members, torch.float16)
    assert tensors["weight"].is_contiguous()
    codes = unpack(tensors["weight"], bits, 192).float()
    repeat = 192 // tensors["weight_scale"].shape[2]
    scale, zero = (tensors[name].float().repeat_interleave(repeat, 2) for name in ("weight_scale", "zero_point"))
    for position, expert in enumerate(members):
        exact = dense_expert(packed.matrices, expert, packed.words, packed.scales, packed.zeros, torch.float32)
        assert torch.equal(((codes - zero) * scale)[position], exact)


def test_packing_is_a_bitstream_of_32_codes_as_humming_reads_it() -> None:
    packed = matrices([3], 64, 64, 32)
    row = humming.class_tensors(packed, [0], torch.float16)["weight"][0, 5]
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
    codes = unpack(packed.words.view(64, -1), 3, 64)[5]
    assert [stream >> (3 * k) & 7 for k in range(64)] == codes.tolist()


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_rounding_stays_within_what_the_module_says(bits: int, dtype: torch.dtype, digits: int) -> None:
    packed = matrices([bits], 64, 128, 32)
    found = rounded_weights(packed, [0], dtype)[0].double()
    exact = dense_expert(packed.matrices, 0, packed.words, packed.scales, packed.zeros, torch.float64)
    unit = 2.0**-digits
    zero, scale = (t[0].double().repeat_interleave(32, dim=1) for t in (packed.zeros, packed.scales))
    lost = 0.0 if dtype == torch.float16 else 1.02 * unit * zero * scale
    assert torch.all((found - exact).abs() <= lost + 4 * unit * exact.abs() + 2.0**-24)


@pytest.mark.parametrize("name", ["scales", "zeros"])
def test_overflowing_scales_and_zeros_are_refused(name: str) -> None:
    packed = matrices([4], 64, 64, 32)
    values = {"scales": packed.scales.float(), "zeros": packed.zeros.float()}
    values[name][0, 3, 1] = 1e6
    wide = PackedMatrices(packed.matrices, packed.words, values["scales"], values["zeros"])
    with pytest.raises(UsageError, match=name):
        humming.class_tensors(wide, [0], torch.float16)
    assert humming.class_tensors(wide, [0], torch.bfloat16)["zero_point"].dtype == torch.bfloat16


@pytest.mark.parametrize("block_size", [8, 24, 64])
@pytest.mark.parametrize("name", ROUTINGS)
def test_align_gives_every_pair_of_the_class_once(name: str, block_size: int) -> None:
    ids = routing(name, len(MIXED), 3)
    safe = torch.where(ids < 0, len(MIXED), ids)
    for members in humming.width_classes(MIXED).values():
        table = humming.expert_map(members, len(MIXED), torch.device("cpu"))
        pairs, owners, count = humming.align(safe, table, block_size)
        assert int(count) % block_size == 0
        assert int(count) <= len(pairs) == len(owners) * block_size
        found: dict[int, list[int]] = {}
        for begin in range(0, int(count), block_size):
            block = [p for p in pairs[begin : begin + block_size].tolist() if p < ids.numel()]
            assert block
            found.setdefault(int(owners[begin // block_size]), []).extend(block)
        expected = {i: torch.nonzero(ids.flatten() == e).flatten().tolist() for i, e in enumerate(members)}
        assert found == {i: own for i, own in expected.items() if own}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("bits", MIXES, ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_classes_add_up_to_the_layer(bits: list[int], name: str, dtype: torch.dtype) -> None:
    experts, ids = layer(bits), routing(name, len(bits), min(2, len(bits)))
    x, weights = inputs(ids, dtype)
    assert_near(humming.HummingLayer(experts, dtype)(x, weights, ids), reference(experts, x, weights, ids), ids)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("group_size", "offset"), [(32, 0), (128, 0), (-1, 0), (128, 64)])
def test_group_sizes_and_tensor_parallel_slices(group_size: int, offset: int) -> None:
    experts, ids = layer(MIXED, group_size, offset), routing("random", len(MIXED), 2).long()
    x, weights = inputs(ids, torch.float16)
    found = humming.HummingLayer(experts, torch.float16)(x, weights, ids)
    assert_near(found, reference(experts, x, weights, ids), ids)


@pytest.mark.usefixtures("on_cpu")
def test_no_tokens_and_another_dtype() -> None:
    subject = humming.HummingLayer(layer(MIXED), torch.float16)
    ids = torch.empty(0, 2, dtype=torch.int32)
    assert subject(*inputs(ids, torch.float16), ids).shape == (0, HIDDEN)
    with pytest.raises(UsageError, match=r"torch\.float16"):
        subject(*inputs(ids, torch.bfloat16), ids)


@pytest.mark.usefixtures("on_cpu")
def test_warm_up_reaches_every_kernel() -> None:
    subject = humming.HummingLayer(layer(MIXED), torch.bfloat16)
    subject.warm_up(torch.bfloat16, 2)
    for _, _, *pair in subject._classes:
        for gemm in pair:
            assert isinstance(gemm, CpuGemm)
            assert set(gemm.regimes()) <= set(gemm.told)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hummings_schema_takes_the_tensors(bits: int, group_size: int, dtype: torch.dtype) -> None:
    schemas = pytest.importorskip("humming.schema")
    packed = matrices([bits] * 2, 64, 128, group_size)
    schema = schemas.HummingWeightSchema(
        b_dtype=f"uint{bits}",
        weight_scale_group_size=humming.common_group(packed.matrices),
        has_zero_point=True,
        is_fp_zero_point=True,
    )
    schema.validate_tensors(humming.class_tensors(packed, [0, 1], dtype), 64, 128, dtype, 2)


def test_humming_has_the_functions_that_are_called() -> None:
    forward = pytest.importorskip("humming.forward").humming_forward
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config

    call = ["inputs", "outputs", "sorted_ids", "expert_ids", "num_tokens_padded", "top_k", "valid_shape_m", "locks"]
    tensors = ["weight", "weight_scale", "zero_point", "compute_config", "tuning_config"]
    assert {*call, *tensors} <= set(inspect.signature(forward).parameters)
    prepare = inspect.signature(prepare_and_transform_humming_tensors).parameters
    assert {"tensors", "shape_n", "shape_k", "weight_schema", "num_experts", "torch_dtype", "device"} <= set(prepare)
    assert {"layer_config", "gemm_type", "device"} <= set(inspect.signature(get_heuristics_config).parameters)


@GPU
@pytest.mark.parametrize("bits", MIXES, ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_layer_is_near_the_reference(bits: list[int], name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("humming")
    experts, ids = layer(bits, device="cuda"), routing(name, len(bits), min(2, len(bits))).cuda()
    x, weights = (t.cuda() for t in inputs(ids.cpu(), dtype))
    assert_near(humming.HummingLayer(experts, dtype)(x, weights, ids), reference(experts, x, weights, ids), ids)


@GPU
@pytest.mark.parametrize(("group_size", "offset"), [(32, 0), (64, 0), (128, 0), (-1, 0), (128, 64)])
@pytest.mark.parametrize("tokens", [1, 16, 256, 3000])
def test_gpu_group_sizes(group_size: int, offset: int, tokens: int) -> None:
    pytest.importorskip("humming")
    experts = layer(MIXED, group_size, offset, (1024, 192 if offset else 768), "cuda")
    ids = torch.rand(tokens, len(MIXED)).topk(2)[1].int().cuda()
    x, weights = (t.cuda() for t in inputs(ids.cpu(), torch.bfloat16, 1024))
    found = humming.HummingLayer(experts, torch.bfloat16)(x, weights, ids)
    assert_near(found, reference(experts, x, weights, ids), ids)


@GPU
def test_gpu_graph_replays_other_routing() -> None:
    pytest.importorskip("humming")
    experts = layer(MIXED, device="cuda")
    subject = humming.HummingLayer(experts, torch.bfloat16)
    subject.warm_up(torch.bfloat16, 2)
    ids = routing("random", len(MIXED), 2).cuda()
    x, weights = (t.cuda() for t in inputs(ids.cpu(), torch.bfloat16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = subject(x, weights, ids)
    for name in ("random", "padding rows"):
        ids.copy_(routing(name, len(MIXED), 2))
        graph.replay()
        assert_near(found, reference(experts, x, weights, ids), ids)

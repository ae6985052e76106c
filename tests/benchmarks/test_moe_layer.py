"""Pure functions of the GPU benchmarks: widths, routings, bytes, ordering, allocations, comparison of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.results import fraction, markdown, ratio
from benchmarks.common.timing import spread, summary
from benchmarks.kernels.figure3 import LayerStatistics, allocations, bytes_table, pmq_widths, read
from benchmarks.kernels.moe_layer import KEY_TOKENS, LIMIT, TOKENS, points
from benchmarks.kernels.peers import Setting, UnavailableError, build, random_experts
from benchmarks.kernels.routing import (
    MIXES,
    MODELS,
    ROUTINGS,
    Shape,
    activation_bytes,
    bytes_moved,
    expected_bytes,
    expert_bytes,
    mix_widths,
    nearest_width,
    route,
    route_by_frequency,
    visit_probability,
)
from benchmarks.serving.throughput import Answer, compare, cut, requests
from vllm_moeq.format import TRELLIS_SCHEME
from vllm_moeq.kernels import dense_expert
from vllm_moeq.kernels.reference_layer import ReferenceLayer

SMALL = Shape(experts=8, top_k=2, hidden=256, intermediate=96)
SKEWED = [9.0, 1.0, 4.0, 4.0, 2.0, 6.0, 3.0, 7.0]


@pytest.mark.parametrize("experts", [8, 128, 256])
@pytest.mark.parametrize("mix", MIXES)
def test_mixes_use_every_width_and_meet_the_average(mix: str, experts: int) -> None:
    bits = mix_widths(mix, experts)
    widths, average = MIXES[mix]
    assert len(bits) == experts
    assert set(bits) == set(widths)
    if average is not None:
        assert sum(bits) / experts == average
    else:
        counts = [bits.count(width) for width in widths]
        assert max(counts) - min(counts) <= 1


def test_widths_are_spread_over_the_indices() -> None:
    bits = mix_widths("1,2,3", 128)
    for half in (bits[:64], bits[64:]):
        assert abs(sum(half) / 64 - 2.5) < 0.05


def test_nearest_width_rounds_halves_up() -> None:
    assert [nearest_width(average) for average in (2.5, 3.5, 4.7, 7.0)] == [3, 4, 4, 8]


@pytest.mark.parametrize("kind", ROUTINGS)
def test_routing_is_seeded_and_has_distinct_experts(kind: str) -> None:
    shape = MODELS["qwen3-30b-a3b"]
    weights, ids = route(kind, 50, shape, seed=3)
    again = route(kind, 50, shape, seed=3)
    assert torch.equal(ids, again[1])
    assert torch.equal(weights, again[0])
    assert not torch.equal(ids, route(kind, 50, shape, seed=4)[1])
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert ids.shape == (50, 8)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(50))


def test_zipf_prefers_the_same_experts_in_every_draw() -> None:
    shape = MODELS["qwen3-30b-a3b"]
    counts = [torch.bincount(route("zipf", 2000, shape, seed)[1].flatten(), minlength=128) for seed in (0, 1)]
    assert counts[0].argmax() == counts[1].argmax()
    assert int(counts[0].max()) > 20 * int(counts[0].min())
    even = torch.bincount(route("uniform", 2000, shape, 0)[1].flatten(), minlength=128)
    assert int(even.max()) < 2 * int(even.min())


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_routing_by_frequency_visits_experts_as_often_as_measured(tokens: int) -> None:
    _, ids = route_by_frequency(SKEWED, tokens, top_k=2, seed=0)
    assert all(len(set(row)) == 2 for row in ids.tolist())
    counts = torch.bincount(ids.flatten(), minlength=8).tolist()
    expected = [share * tokens for share in visit_probability(SKEWED, 2)]
    assert all(abs(a - b) <= 1 for a, b in zip(counts, expected, strict=True))


def test_a_frequency_that_top_k_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="top-2"):
        route_by_frequency([10.0, 1.0, 1.0], 4, top_k=2, seed=0)


def test_bytes_of_an_expert_are_those_of_its_tensors() -> None:
    for width in (1, 2, 3, 4, 8):
        packed = random_experts([width], SMALL, 128, torch.device("cpu"))
        parts = [getattr(matrices, name) for matrices in (packed.gate_up, packed.down) for name in ("words", "scales")]
        size = sum(part.numel() * part.element_size() for part in parts)
        size += sum(m.zeros.numel() * m.zeros.element_size() for m in (packed.gate_up, packed.down))
        assert expert_bytes(width, SMALL, 128) == size


def test_bytes_count_touched_experts_once() -> None:
    bits = [1, 2, 3, 3, 2, 1, 3, 3]
    ids = torch.tensor([[0, 2], [2, 0], [-1, 0]], dtype=torch.int32)
    weights = expert_bytes(1, SMALL, 128) + expert_bytes(3, SMALL, 128)
    assert bytes_moved(bits, ids, SMALL, 128) == weights + activation_bytes(3, SMALL)
    assert activation_bytes(3, SMALL) == 2 * (2 * 3 * 256 + 2 * 6 * 96)


def test_expected_bytes_are_the_mean_over_routings() -> None:
    bits, visit = [3, 1, 2, 3, 2, 3, 3, 3], visit_probability(SKEWED, 2)
    _, ids = route_by_frequency(SKEWED, 900, 2, seed=0)
    drawn = sum(bytes_moved(bits, row[None], SMALL, 128) - activation_bytes(1, SMALL) for row in ids) / len(ids)
    assert drawn == pytest.approx(expected_bytes(bits, visit, 1, SMALL, 128), rel=0.01)
    assert expected_bytes(bits, visit, 10**4, SMALL, 128) == pytest.approx(
        sum(expert_bytes(width, SMALL, 128) for width in bits)
    )


def test_random_weights_have_about_unit_gain_and_exact_scales() -> None:
    packed = random_experts([1, 2, 3, 4, 8, 8, 8, 8], SMALL, 128, torch.device("cpu")).gate_up
    for values in (packed.scales, packed.zeros):
        assert torch.equal(values.bfloat16().half(), values)
    for expert in range(8):
        weight = dense_expert(packed.matrices, expert, packed.words, packed.scales, packed.zeros, torch.float32)
        assert 0.5 < float(weight.std()) * 256**0.5 < 2


def test_padding_counts_as_zero() -> None:
    packed = random_experts([4] * 8, SMALL, 128, torch.device("cpu"), symmetric=True, intermediate=128)
    assert packed.intermediate == 128
    scales = packed.gate_up.scales.view(8, 2, 128, -1)
    assert not scales[:, :, 96:].any()
    assert scales[:, :, :96].all()
    assert bool((packed.gate_up.zeros == 8).all())


def test_rivals_say_why_they_are_missing_on_a_cpu() -> None:
    device = torch.device("cpu")
    setting = Setting(SMALL, random_experts([2] * 8, SMALL, 128, device), 128, torch.bfloat16, device)
    for name in ("bf16", "marlin-w4", "humming-classes", "humming-uniform"):
        with pytest.raises(UnavailableError, match="GPU"):
            build(name, setting)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are compiled, not interpreted")
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("name", ["trellis-w2", "trellis-w2-grid-w3"])
def test_layers_with_trellises_are_right(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as it was when the kernels were imported
    device, shape = torch.device("cpu"), MODELS["tiny"]
    setting = Setting(shape, random_experts([2] * 8, shape, 128, device), 128, torch.float16, device)
    peer = build(name, setting)
    weights, ids = route("uniform", tokens, shape, 0)
    x = torch.randn((tokens, shape.hidden), generator=torch.Generator().manual_seed(0))
    found, exact = peer.call(x.half(), weights, ids), ReferenceLayer(peer.weights)(x.half().float(), weights, ids)
    assert float((found.float() - exact).norm() / exact.norm()) < LIMIT
    assert {scheme.name for scheme in peer.weights.gate_up.matrices.schemes} >= {TRELLIS_SCHEME.name}


def test_the_most_informative_points_come_first() -> None:
    models = [name for name in MODELS if name != "tiny"]
    order = points(models, list(MIXES), list(ROUTINGS), TOKENS)
    assert len(order) == len(set(order)) == len(models) * len(MIXES) * len(ROUTINGS) * len(TOKENS)
    first = order[: len(KEY_TOKENS)]
    assert {(point.model, point.mix, point.routing) for point in first} == {("mixtral-8x7b", "1,2,3", "uniform")}
    assert [point.tokens for point in first] == list(KEY_TOKENS)
    assert {point.model for point in order[: 3 * len(KEY_TOKENS)]} == {"mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"}
    assert order[-1].routing == "zipf"


def table() -> LayerStatistics:
    loss = [[8.0 / (1 + expert), 2.0 / (1 + expert), 0.2] for expert in range(8)]
    return LayerStatistics(SKEWED, [value / 3 for value in SKEWED], loss)


def test_figure3_methods_spend_the_same_bits_in_opposite_directions() -> None:
    for average in (1.75, 2.0, 2.25, 2.5):
        found = allocations(table(), average, seed=0)
        assert {sum(bits) for bits in found.values()} == {int(8 * average)}
        assert found["paper"][SKEWED.index(min(SKEWED))] == 3
        assert found["frequent-first"][SKEWED.index(max(SKEWED))] == 3
        rows = {row["method"]: row for row in bytes_table([table()], average, SMALL, 128) if row["tokens"] == 1}
        assert rows["paper"]["ratio"] == 1
        assert all(row["ratio"] >= 1 for row in rows.values())
        assert rows["frequent-first"]["bytes"] == max(row["bytes"] for row in rows.values())


def test_pmq_keeps_its_minimum_of_wide_experts() -> None:
    bits = pmq_widths(table(), 11)
    assert sum(bits) <= 11
    assert {2, 3} <= set(bits)


def test_statistics_are_read_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"frequency": [[1, 2]] * 3, "weight": [[3, 4]] * 3, "loss": [[[1, 2, 3]] * 2] * 3}))
    layers = read(path)
    assert len(layers) == 3
    assert layers[1].weight == [3, 4]


def test_times_are_the_mean_over_inputs_of_the_median() -> None:
    assert summary([[1.0, 2.0, 90.0], [3.0, 4.0, 5.0]]) == 3.0
    assert spread([[2.0, 2.0, 2.0]]) == 0


def test_ratios_and_bandwidth_refer_to_ours() -> None:
    peers = {
        "triton": {"us": 10.0, "note": ""},
        "bf16": {"us": 25.0, "note": "tuned"},
        "marlin-w4": {"skipped": "no GPU"},
        "humming-uniform": {"skipped": "refused: relative error 1", "note": ""},
    }
    row = {"model": "tiny", "mix": "2,3", "routing": "uniform", "tokens": 1, "average_bits": 2.5, "bytes": 2e6,
           "widths": {"2": 4, "3": 4}, "peers": peers}  # fmt: skip
    assert ratio(row, "bf16") == 2.5
    assert ratio(row, "marlin-w4") is None
    assert fraction(row, 4e11) == pytest.approx(0.5)
    result = {"device": "x", "date": "d", "versions": {"torch": "2"}, "bandwidth": {"read": 4e11, "copy": 3e11},
              "peers": list(peers), "rows": [row], "launch_floor_us": 2.0,
              "settings": {"dtype": "bfloat16", "group_size": 128}}  # fmt: skip
    text = markdown(result)
    assert "| 1 | 2.0 | 10.0 | 50% | 25.0 (2.50) | – | refused |" in text
    assert "- marlin-w4: no GPU" in text


def test_answers_are_compared_up_to_the_first_difference() -> None:
    same = Answer(["a", "b"], [{"a": -0.1}, {"b": -0.2}])
    mine = Answer(["a", "c"], [{"a": -0.1}, {"c": -0.5, "d": -0.6}])
    theirs = Answer(["a", "d"], [{"a": -0.1}, {"c": -0.7, "d": -0.4}])
    found = compare([same, mine], [same, theirs])
    assert found["identical"] == 1
    assert found["worst_gap"] == pytest.approx(0.3)
    assert found["parted"][0]["token"] == 1
    unknown = Answer(["a", "e"], [{"a": -0.1}, {"e": -0.1}])
    assert compare([unknown], [theirs])["worst_gap"] > 100


def test_prompts_are_as_many_and_as_long_as_asked() -> None:
    texts = cut("abcdefghij" * 50, 8, 40)
    assert len(texts) == 8
    assert {len(text) for text in texts} == {40}
    assert [requests(each, 4) for each in (1, 8, 32)] == [8, 32, 128]

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from planner.common.progress import Progress
from planner.common.units import GIB
from planner.model.layout import Layout, MoeLayer, read_layout
from planner.model.sizes import Sizes, Storage, average_for_budget, estimate, layer_bytes, linear_bytes
from planner.model.source import SourceModel
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions
from planner.quantization.run import quantize
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import TRELLIS_SCHEME, Linear, Projections, ShardSet, UsageError, verify

QUIET = Progress(quiet=True)
LINEAR = Linear(bits=4, group_size=32)
OUTPUT = "model.layers.{}.self_attn.o_proj"
MIXED = Linear(bits=4, group_size=32, widths={OUTPUT.format(0): 8, OUTPUT.format(1): 16})
MIXTRAL_8X7B = MoeLayer(
    index=0,
    block="layer",
    prefix="experts",
    router="gate",
    num_experts=8,
    projections=Projections(gate="w1", up="w3", down="w2"),
    shapes={"w1": (14336, 4096), "w3": (14336, 4096), "w2": (4096, 14336)},
)


@pytest.fixture
def source(tiny_mixtral: Path) -> Iterator[SourceModel]:
    with SourceModel(tiny_mixtral) as model:
        yield model


@pytest.fixture
def layout(source: SourceModel) -> Layout:
    return read_layout(source)


def sizes_for(source: SourceModel, layout: Layout, total_bits: int) -> Sizes:
    """Return the sizes of a plan that spends ``total_bits`` over all experts."""
    options = PlanOptions(Fraction(total_bits, layout.num_experts), (1, 2, 3))
    made = make_plan(source, layout, options, QUIET)
    assert sum(map(sum, made.experts.values())) == total_bits
    return estimate(source, layout, made.experts, 32, LINEAR)


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize(
    "linear", [LINEAR, MIXED, Linear(bits=8, group_size=64), Linear(bits=16)], ids=["4", "mixed", "8", "16"]
)
@pytest.mark.parametrize("average", ["1", "2.3"])
def test_equals_the_bytes_that_are_written(
    source: SourceModel, layout: Layout, tmp_path: Path, group_size: int, linear: Linear, average: str
) -> None:
    made = make_plan(source, layout, PlanOptions(Fraction(average), (1, 2, 3)), QUIET)
    sizes = estimate(source, layout, made.experts, group_size, linear)
    settings = QuantizeSettings("rtn", "sign", group_size, linear)
    quantize(source, layout, made, tmp_path / "out", settings, QUIET)
    written = verify(tmp_path / "out")
    assert (sizes.expert_bytes, sizes.linear_bytes + sizes.kept_bytes) == (written.expert_bytes, written.other_bytes)


def test_the_total_is_the_sum_of_its_parts(source: SourceModel, layout: Layout) -> None:
    sizes = sizes_for(source, layout, 32)
    assert sizes.as_dict()["total_bytes"] == sizes.expert_bytes + sizes.linear_bytes + sizes.kept_bytes


def test_the_source_is_all_its_tensors(source: SourceModel, layout: Layout, tiny_mixtral: Path) -> None:
    found = sizes_for(source, layout, 32).source_bytes
    assert found == sum(info.nbytes for info in ShardSet(tiny_mixtral).tensors.values())


@pytest.mark.parametrize("widths", [[2] * 8, [1, 1, 2, 2, 3, 3, 4, 8]])
def test_experts_take_their_bits_and_32_more_per_group(widths: Sequence[int]) -> None:
    weights = 3 * 4096 * 14336
    expected = sum(weights * (bits + 32 / 128) / 8 for bits in widths)
    assert layer_bytes(MIXTRAL_8X7B, widths, 128) == pytest.approx(expected, rel=0.01)


def test_whole_rows_take_one_scale_and_zero_each() -> None:
    rows = 14336 + 14336 + 4096
    assert layer_bytes(MIXTRAL_8X7B, [2], -1) == 3 * 4096 * 14336 * 2 // 8 + 4 * rows


def test_linears_of_16_bits_stay_as_they_are(source: SourceModel, layout: Layout) -> None:
    expected = sum(source.shards.info(name).nbytes for name in layout.linears)
    assert linear_bytes(source, layout, Linear(bits=16)) == expected


def test_the_largest_shard_is_the_largest_file(source: SourceModel, layout: Layout, tmp_path: Path) -> None:
    made = make_plan(source, layout, PlanOptions(Fraction("2.5"), (1, 2, 3)), QUIET)
    sizes = estimate(source, layout, made.experts, 32, LINEAR)
    quantize(source, layout, made, tmp_path / "out", QuantizeSettings("rtn", "sign", 32, LINEAR), QUIET)
    with ShardSet(tmp_path / "out") as written:
        files: dict[str, int] = {}
        for info in written.tensors.values():
            files[info.shard] = files.get(info.shard, 0) + info.nbytes
    assert sizes.largest_shard_bytes == max(files.values())


@pytest.mark.parametrize("total_bits", range(17, 48, 3))
@pytest.mark.parametrize("spare_bytes", [1, 700])
def test_a_budget_buys_what_fits_and_no_bit_more(
    source: SourceModel, layout: Layout, total_bits: int, spare_bytes: int
) -> None:
    budget = sizes_for(source, layout, total_bits).total_bytes + spare_bytes
    average = average_for_budget(source, layout, budget / GIB, (1, 2, 3), 32, LINEAR)
    assert sizes_for(source, layout, int(average * 16)).total_bytes <= budget
    assert sizes_for(source, layout, int(average * 16) + 1).total_bytes > budget


@pytest.mark.parametrize("wide", [1, 8, 15])
def test_the_budget_holds_where_wider_experts_have_another_scheme(
    source: SourceModel, layout: Layout, wide: int
) -> None:
    """Grids of eight bits have scales that trellises lack."""
    widths = [8] * wide + [2] * (layout.num_experts - wide)
    experts = dict(zip((layer.prefix for layer in layout.layers), (widths[:8], widths[8:]), strict=True))
    storage = Storage(TRELLIS_SCHEME, rotated=True)
    budget = estimate(source, layout, experts, 32, LINEAR, storage).total_bytes - 1
    average = average_for_budget(source, layout, budget / GIB, (2, 8), 32, LINEAR, storage)
    assert sum(widths) - 1 < average * layout.num_experts < sum(widths)


def test_a_large_budget_buys_the_largest_width(source: SourceModel, layout: Layout) -> None:
    assert average_for_budget(source, layout, 1.0, (1, 2, 3), 32, LINEAR) == 3


def test_the_smallest_budget_buys_the_smallest_width(source: SourceModel, layout: Layout) -> None:
    budget = sizes_for(source, layout, 16).total_bytes + 1
    assert int(16 * average_for_budget(source, layout, budget / GIB, (1, 2, 3), 32, LINEAR)) == 16


def test_a_budget_below_the_smallest_width_is_refused(source: SourceModel, layout: Layout) -> None:
    budget = sizes_for(source, layout, 16).total_bytes - 1
    with pytest.raises(UsageError, match="--budget-gib: 1 bits for every expert take"):
        average_for_budget(source, layout, budget / GIB, (1, 2, 3), 32, LINEAR)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_budgets_are_refused(source: SourceModel, layout: Layout, budget: float) -> None:
    with pytest.raises(UsageError, match="--budget-gib"):
        average_for_budget(source, layout, budget, (1, 2, 3), 32, LINEAR)


def test_wider_experts_weigh_more(source: SourceModel, layout: Layout) -> None:
    small, large = (dataclasses.asdict(sizes_for(source, layout, bits)) for bits in (20, 21))
    assert large.pop("expert_bytes") - small.pop("expert_bytes") == 3 * 64 * 128 // 8

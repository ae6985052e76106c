"""One budget of bytes for experts and linears."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest

from planner.model.layout import Layout
from planner.model.linear_groups import linear_groups
from planner.model.sizes import estimate
from planner.model.source import SourceModel
from planner.planning.priced import Priced
from planner.planning.request import LinearChoice, PlanOptions, check_options
from planner.planning.together import WIDTHS, objective, solve_together
from planner.quantization.settings import default_linear
from tests.shipped import mixtral_gib
from vllm_moeq.format import GRID, Linear, UsageError, split_width

CHOICES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def four(source: SourceModel, layout: Layout) -> Linear:
    return default_linear(source, layout, 4)


def options(four: Linear, average: str = "2", **others: Any) -> PlanOptions:
    made = PlanOptions(Fraction(average), CHOICES, "kl", calibrated=True, linears=LinearChoice(four.group_size, "gptq"))
    return PlanOptions(**{**vars(made), **others})


def grids(layout: Layout, chosen: PlanOptions, experts: dict[str, list[list[float]]]) -> Priced:
    """Return the way in which all experts are grids, with these costs."""
    each = {layer.prefix: [[GRID] * len(CHOICES)] * layer.num_experts for layer in layout.layers}
    return Priced(chosen, experts, each)


def tables(layout: Layout, seed: int, scale: float) -> tuple[dict[str, list[list[float]]], list[list[float]]]:
    """Return costs of experts and of linears: each bit less costs some times more."""
    draw = random.Random(seed)
    experts = {
        layer.prefix: [
            [damage * 4.0**-bits for bits in CHOICES]
            for damage in (draw.lognormvariate(0, 1.5) for _ in range(layer.num_experts))
        ]
        for layer in layout.layers
    }
    full = [scale * draw.lognormvariate(0, 1) for _ in linear_groups(layout)]
    return experts, [[cost, cost / 250, 0.0] for cost in full]


def total_bytes(source: SourceModel, layout: Layout, linear: Linear, experts: dict[str, list[int]]) -> int:
    return estimate(source, layout, experts, 128, linear).total_bytes


def by_layer(layout: Layout, widths: dict[tuple[str, int], int]) -> dict[str, list[int]]:
    return {
        layer.prefix: [widths[layer.prefix, expert] for expert in range(layer.num_experts)] for layer in layout.layers
    }


@pytest.mark.parametrize("average", ["1", "1.53", "2", "2.5", "4"])
@pytest.mark.parametrize("scale", [0.001, 0.05, 10.0])
def test_no_larger_than_with_four_bits(
    source: SourceModel, layout: Layout, four: Linear, average: str, scale: float
) -> None:
    experts, linears = tables(layout, 1, scale)
    widths, found = solve_together(source, layout, grids(layout, options(four, average), experts), linears)
    assert set(found) == {name.removesuffix(".weight") for name in layout.linears}
    assert split_width(found) is None
    spent = total_bytes(source, layout, four.model_copy(update={"widths": found}), by_layer(layout, widths))
    bits = math.floor(Fraction(average) * layout.num_experts)
    even = (bits - layout.num_experts) * layout.layers[0].weights_per_expert // 8
    ones = {layer.prefix: [1] * layer.num_experts for layer in layout.layers}
    assert spent <= total_bytes(source, layout, four, ones) + even
    if average == "1":
        assert set(widths.values()) == {1}
        assert set(found.values()) == {4}


def test_costly_linears_get_bits_and_harmless_ones_give_none(source: SourceModel, layout: Layout, four: Linear) -> None:
    found = []
    for scale in (1e-6, 0.5, 1000.0):
        experts, linears = tables(layout, 2, scale)
        _, widths = solve_together(source, layout, grids(layout, options(four), experts), linears)
        found.append(sum(widths.values()))
        assert objective(layout, linears, widths) <= objective(layout, linears, dict.fromkeys(widths, 4))
    assert found[0] == 4 * len(layout.linears) < found[1] < found[2]


def test_a_budget_is_spent_on_linears_when_experts_have_enough(
    source: SourceModel, layout: Layout, four: Linear
) -> None:
    experts, linears = tables(layout, 3, 1.0)
    widths, found = solve_together(source, layout, grids(layout, options(four, "4", budget_gib=1.0), experts), linears)
    assert set(widths.values()) == {4}
    assert set(found.values()) == {WIDTHS[-1]}


@pytest.mark.parametrize("average", [1.5, 2, 2.5])
def test_a_budget_is_kept(source: SourceModel, layout: Layout, four: Linear, average: float) -> None:
    budget = 1.003 * mixtral_gib(average)  # no whole number of steps
    experts, linears = tables(layout, 4, 0.05)
    widths, found = solve_together(
        source, layout, grids(layout, options(four, "4", budget_gib=budget), experts), linears
    )
    spent = total_bytes(source, layout, four.model_copy(update={"widths": found}), by_layer(layout, widths))
    largest = layout.layers[0].weights_per_expert // 8
    assert budget * 2**30 - largest < spent <= budget * 2**30


def test_fixed_experts_keep_their_widths(source: SourceModel, layout: Layout, four: Linear) -> None:
    prefix = layout.layers[0].prefix
    experts, linears = tables(layout, 5, 0.05)
    fixed = {f"{prefix}.0": 4, f"{prefix}.1": 1}
    widths, _ = solve_together(source, layout, grids(layout, options(four, overrides=fixed), experts), linears)
    assert widths[prefix, 0] == 4
    assert widths[prefix, 1] == 1
    everyone = {f"{layer.prefix}.{expert}": 4 for layer in layout.layers for expert in range(layer.num_experts)}
    with pytest.raises(UsageError, match="--overrides: the widths given leave too few bytes"):
        solve_together(source, layout, grids(layout, options(four, overrides=everyone), experts), linears)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"method": "pmq"}, "expected --method kl or kl-estimated, .* found pmq"),
        ({"method": "auto", "calibrated": False}, ".*which need --data TEXT or --stats FILE, found router-norm-maxvar"),
        ({"ranking": "layer"}, "expected --ranking global, .* found layer"),
    ],
)
def test_what_cannot_choose_for_linears_is_refused(four: Linear, others: dict[str, Any], reason: str) -> None:
    check_options(options(four))
    with pytest.raises(UsageError, match=f"--linear-bits auto: {reason}"):
        check_options(options(four, **others))

"""The ways of storing experts that a plan may choose: what each costs, and which one ``auto`` takes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.planning.make import _chosen as chosen
from planner.planning.method import LayerScores
from planner.planning.methods import METHODS
from planner.planning.priced import Priced, priced
from planner.planning.request import PlanOptions, check_options
from vllm_moeq.format import UsageError

CHOICES = (1, 2, 3, 4)
KL = METHODS["kl"]
BETTER, WORSE = 0.1, 0.9


def options(scheme: str = "auto", **others: Any) -> PlanOptions:
    known = {"avg_bits": Fraction(2), "bit_choices": CHOICES, "method": "kl", "calibrated": True, "quantizer": "gptq"}
    return PlanOptions(**{**known, "scheme": scheme, **others})


def scores(layout: Layout, trellis: float, rotated: float, gptq: float) -> dict[str, LayerScores]:
    """Return scores of experts that differ by their index alone, with these gains at every width."""

    def of(count: int) -> LayerScores:
        found = {}
        for bits in CHOICES:
            plain = [(1.0 + expert) * 4.0**-bits for expert in range(count)]
            found[f"kl_{bits}"] = plain
            found[f"kl_gptq_{bits}"] = [gptq * cost for cost in plain]
            for name, gain in (("trellis", trellis), ("rotated", rotated), ("viterbi", 1.0)):
                found[f"gain_{name}_{bits}"] = [gain] * count
        return found

    return {layer.prefix: of(layer.num_experts) for layer in layout.layers}


def names(way: Priced, experts: dict[str, list[int]]) -> set[str]:
    return {name for layer in way.names(experts).values() for name in layer}


@pytest.mark.parametrize(("quantizer", "gain"), [("gptq", 0.1), ("hqq", 1.0)])
def test_a_trellis_has_its_quantizers_costs(layout: Layout, quantizer: str, gain: float) -> None:
    (way,) = priced(layout, KL, scores(layout, 0.1, 0.5, 0.3), options("trellis", quantizer=quantizer))
    prefix = layout.layers[0].prefix
    assert way.tables[prefix][2] == pytest.approx([gain * 3 * 4.0**-bits for bits in CHOICES])
    assert names(way, {prefix: [2] * 8}) == {"trellis"}


def test_grids_keep_their_costs(layout: Layout) -> None:
    (way,) = priced(layout, KL, scores(layout, 0.1, 0.5, 0.3), options("grid"))
    prefix = layout.layers[0].prefix
    assert way.tables[prefix][0] == pytest.approx([0.3 * 4.0**-bits for bits in CHOICES])
    assert way.names({prefix: [2] * 8}) == {}


def test_eight_bits_stay_a_grid(layout: Layout) -> None:
    (way,) = priced(layout, METHODS["random"], {}, options("trellis", bit_choices=(2, 8)))
    prefix = layout.layers[0].prefix
    assert way.names({prefix: [2, 8] * 4}) == {prefix: ["trellis", "grid"] * 4}


@pytest.mark.parametrize(
    ("gains", "expected"),
    [((BETTER, WORSE, 0.3), {"trellis"}), ((WORSE, WORSE, 0.3), set()), ((0.2, 0.01, 0.3), {"grid"})],
)
def test_auto_takes_what_costs_less(
    source: SourceModel, layout: Layout, gains: tuple[float, float, float], expected: set[str]
) -> None:
    found = scores(layout, *gains)
    made = min(
        (chosen(source, layout, KL, found, way) for way in priced(layout, KL, found, options())),
        key=lambda it: it.cost,
    )
    assert names(made.way, made.experts(layout)) == expected
    assert sum(map(sum, made.experts(layout).values())) <= 2 * layout.num_experts


def test_each_expert_has_the_scheme_that_is_better_for_it(layout: Layout) -> None:
    found = scores(layout, 0.2, 0.9, 0.3)
    prefix = layout.layers[0].prefix
    found[prefix] = {**found[prefix], "gain_rotated_2": [0.01] + [0.9] * 7}
    _, way = priced(layout, KL, found, options())
    assert way.names({prefix: [2] * 8})[prefix] == ["grid"] + ["trellis"] * 7
    assert way.names({prefix: [3] * 8})[prefix] == ["trellis"] * 8
    assert way.tables[prefix][0][1] == pytest.approx(0.01 / 16)


def test_a_budget_allows_trellises_more_bits(layout: Layout) -> None:
    grids, trellises = priced(
        layout, KL, scores(layout, 0.2, 0.01, 0.3), options(budget_gib=1.0, trellis_bits=Fraction(9, 4))
    )
    assert (grids.options.avg_bits, trellises.options.avg_bits) == (2, Fraction(9, 4))
    assert names(trellises, {layer.prefix: [3] * 8 for layer in layout.layers}) == {"trellis"}  # a grid is larger


@pytest.mark.parametrize(
    ("others", "found"),
    [({"method": "pmq"}, "pmq with gptq"), ({"quantizer": "hqq"}, "kl with hqq"), ({"method": "random"}, "random")],
)
def test_auto_without_measurements_is_refused(others: dict[str, Any], found: str) -> None:
    check_options(options())
    with pytest.raises(UsageError, match=f"--scheme auto: expected --method kl or kl-estimated .*, found {found}"):
        check_options(options(**others))

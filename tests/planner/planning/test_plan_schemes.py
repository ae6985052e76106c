"""Schemes of experts in plan.json: written only where there are some, and checked like widths."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from planner.plan_file import Plan
from planner.quantization.settings import QuantizeSettings
from tests.by_hand import plan_by_hand

PREFIX, OTHER = "model.layers.0.experts", "model.layers.1.experts"
WIDTHS = {PREFIX: [2, 8, 3], OTHER: [1, 1, 4]}
SCHEMES = {PREFIX: ["trellis", "grid", "grid"], OTHER: ["grid"] * 3}


def content(schemes: dict[str, Any]) -> dict[str, Any]:
    return {**plan_by_hand(WIDTHS).model_dump(mode="json"), "schemes": schemes}


def test_a_plan_of_grids_does_not_name_them() -> None:
    plan = Plan.model_validate(content({}))
    assert "schemes" not in plan.model_dump(mode="json")
    assert QuantizeSettings().with_plan(plan) == QuantizeSettings()


def test_a_plan_decides_over_the_width() -> None:
    plan = Plan.model_validate(content(SCHEMES))
    storage = QuantizeSettings().with_plan(plan).storage
    assert storage.rotated
    assert [scheme.name for scheme in storage.schemes(PREFIX, WIDTHS[PREFIX])] == SCHEMES[PREFIX]
    assert {scheme.name for scheme in storage.schemes(OTHER, WIDTHS[OTHER])} == {"grid"}
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [
        ({PREFIX: SCHEMES[PREFIX]}, f"schemes: {OTHER}: expected the schemes of its experts, found none"),
        ({**SCHEMES, "x": ["grid"]}, "schemes: x: expected 0 names, found 1"),
        ({**SCHEMES, OTHER: ["grid"]}, f"schemes: {OTHER}: expected 3 names, found 1"),
        ({**SCHEMES, PREFIX: ["trellis"] * 3}, f"schemes: {PREFIX}: expert 1: expected grid, found 'trellis'"),
        ({**SCHEMES, OTHER: ["hexagon"] * 3}, f"schemes: {OTHER}: expert 0: expected grid or trellis, found 'hexagon'"),
        ({**SCHEMES, OTHER: "grid"}, "valid list"),
    ],
)
def test_schemes_that_fit_no_expert_are_refused(schemes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as found:
        Plan.model_validate(content(schemes))
    assert reason in str(found.value)

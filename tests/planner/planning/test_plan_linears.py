"""Widths of linears in plan.json: written only where there are some, and checked like those of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.model.layout import Layout
from planner.plan_file import Plan, read_plan
from planner.quantization.run import build_config
from planner.quantization.settings import QuantizeSettings
from tests.by_hand import plan_by_hand
from vllm_moeq.format import ConfigError

FIRST = "model.layers.0.self_attn"


def widths_of(layout: Layout, bits: int = 4) -> dict[str, int]:
    return {name.removesuffix(".weight"): bits for name in layout.linears}


def with_linears(layout: Layout, linears: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a plan.json with these widths."""
    plain = plan_by_hand({layer.prefix: [2] * layer.num_experts for layer in layout.layers})
    return {**plain.model_dump(mode="json"), "linears": linears}


def test_a_plan_without_widths_of_linears_does_not_name_them(layout: Layout) -> None:
    plain = with_linears(layout, {})
    plan = Plan.model_validate(plain)
    assert plan.linears == {}
    assert "linears" not in plan.model_dump(mode="json")
    plan.check_against(layout, "x")


def test_widths_are_read_back_and_reach_the_config(layout: Layout, tmp_path: Path) -> None:
    linears = {**widths_of(layout), f"{FIRST}.o_proj": 16, **{f"{FIRST}.{part}_proj": 8 for part in "qkv"}}
    path = tmp_path / "plan.json"
    Plan.model_validate(with_linears(layout, linears)).write(path)
    plan = read_plan(path)
    assert plan.linears == linears
    plan.check_against(layout, str(path))
    config = build_config(layout, plan, QuantizeSettings().with_plan(plan))
    assert config.format_version == 2
    assert config.linear.widths == {f"{FIRST}.{part}_proj": 8 for part in "qkv"}
    assert f"{FIRST}.o_proj" in config.unquantized


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it.update({"model.layers.9.self_attn.o_proj": 8}), r"9\.self_attn\.o_proj: the model has no such"),
        (lambda it: it.pop(f"{FIRST}.o_proj"), r"0\.self_attn\.o_proj: expected a width, found none"),
        (lambda it: it.update({f"{FIRST}.k_proj": 8}), r"expected the . bits of model\.layers\.0\.self_attn\..*joins"),
    ],
)
def test_widths_of_another_model_are_refused(
    layout: Layout, tmp_path: Path, change: Callable[[dict[str, int]], object], reason: str
) -> None:
    linears = widths_of(layout)
    change(linears)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(with_linears(layout, linears)))
    with pytest.raises(ConfigError, match=rf"plan\.json: linears: .*{reason}"):
        read_plan(path).check_against(layout, str(path))


@pytest.mark.parametrize("bits", [3, "8", 8.0, True, None, [8]])
def test_impossible_widths_are_refused(layout: Layout, tmp_path: Path, bits: object) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(with_linears(layout, {**widths_of(layout), f"{FIRST}.o_proj": bits})))
    with pytest.raises(ConfigError, match=r"plan\.json: linears\.model\.layers\.0\.self_attn\.o_proj: "):
        read_plan(path)


@pytest.mark.parametrize("name", ["../x", "", "a b", "x" * 513])
def test_impossible_names_are_refused(layout: Layout, tmp_path: Path, name: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(with_linears(layout, {name: 8})))
    with pytest.raises(ConfigError, match=r"plan\.json: linears"):
        read_plan(path)

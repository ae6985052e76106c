"""docs/models.md: what the script computes, next to what publishers say and to what the command says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.coverage import line, outcome
from benchmarks.models.families import FAMILIES
from benchmarks.models.listed import MODELS, Listed
from benchmarks.models.recipes import HEADER, RECIPES, answers
from benchmarks.models.table import CONFIGS, RECOGNIZED, page, row
from planner.cli import app
from tests.architectures import TINY
from tests.conftest import Outcome
from tests.paths import ROOT
from tests.tiers import thorough

PAGE = ROOT / "docs" / "models.md"
GROUP: Any = typer.main.get_command(app)
QUICK = ("Mixtral-8x7B-v0.1", "granite-3.1-3b-a800m-instruct", "Llama-4-Scout-17B-16E", "gpt-oss-20b")
"""Models whose names of tensors are few, or whose rows differ from the others'."""


def lines() -> list[str]:
    """Return the table's lines about models."""
    return [f"{line}\n" for line in PAGE.read_text().splitlines() if line.startswith("| [")]


def families() -> str:
    """Return the table of other families."""
    return PAGE.read_text().partition(RECOGNIZED)[2].partition(HEADER)[0]


def cells(listed: Listed) -> list[str]:
    """Return the cells about a model."""
    (line,) = (line for line in lines() if f"](https://huggingface.co/{listed.name})" in line)
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_page_is_the_scripts() -> None:
    assert page(lines(), families()) == PAGE.read_text()
    assert len(lines()) == len(MODELS) >= 20
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(listed.short for listed in MODELS)


@pytest.mark.parametrize(
    "listed", thorough(MODELS, [it for it in MODELS if it.short in QUICK]), ids=lambda it: it.short
)
def test_a_row_is_the_scripts(listed: Listed) -> None:
    assert row(listed) in lines()


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough(FAMILIES, ("gemma4", "longcat_flash", "lfm2_moe")))
def test_a_familys_line_is_what_happens(name: str, tmp_path: Path) -> None:
    found = outcome(name, tmp_path)
    assert not found.broken
    before_served = line(found).rstrip("\n")
    assert any(row.startswith(before_served) for row in PAGE.read_text().splitlines())


def test_recipes_take_their_answers_from_both_tables() -> None:
    found = answers((ROOT / "README.md").read_text(), families())
    assert found["qwen3_moe"] == (("yes",) * 4, "`tests/architectures.py`")
    assert found["minimax_m2"][0] == ("yes", "yes", "yes", "not tried")
    assert found["gpt_oss"][0] == ("yes", "yes", "no", "no")
    assert found["hy_v3"] == (("yes",) * 4, "`benchmarks.coverage`")
    assert found["longcat_flash"][0] == ("no",) * 4
    assert {name for name, (_, where) in found.items() if "tests" in where} <= set(TINY)


def test_fifty_of_vllms_recipes_are_computed() -> None:
    found = answers((ROOT / "README.md").read_text(), families())
    read = [
        model for name, models in RECIPES.items() if name in found and found[name][0][2] == "yes" for model in models
    ]
    assert len(read) >= 50
    assert len(set(read)) == len(read)


@pytest.mark.parametrize("listed", MODELS, ids=lambda it: it.short)
def test_parameters_are_the_published_ones(listed: Listed) -> None:
    assert float(cells(listed)[1]) == pytest.approx(listed.billions, rel=0.01)


@pytest.mark.parametrize("listed", MODELS, ids=lambda it: it.short)
def test_the_command_is_one(listed: Listed) -> None:
    words = cells(listed)[-1].strip("`").split()
    assert words[:3] == ["moeq", "quantize", listed.name]
    GROUP.commands["quantize"].make_context("quantize", words[2:])


def test_the_command_says_the_same(moeq: Callable[..., Outcome]) -> None:
    mixtral = MODELS[0]
    flags = ("--preset", "2.5bit", "--context", 8192, "--concurrency", 1, "--gpu-gib", 24)
    found = json.loads(moeq("plan", CONFIGS / mixtral.short, "--dry-run", "--json", *flags).out)
    _, billions, plain, _, size, _, cache, gpus, _ = cells(mixtral)
    assert f"{found['weights']['total'] / 1e9:.2f}" == billions
    assert [f"{found['gib'][name]:.2f}" for name in ("bf16", "ours")] == [plain, size]
    assert f"{found['serving']['cache_bytes'] / 2**30:.2f}" == cache
    assert gpus == f"{found['serving']['gpus']} × 24 GB"


def test_configs_hold_sizes_alone() -> None:
    for path in CONFIGS.glob("*/config.json"):
        assert path.stat().st_size < 2048
        assert "auto_map" not in json.loads(path.read_text())
    assert not [path for path in CONFIGS.rglob("*") if path.is_file() and path.name != "config.json"]

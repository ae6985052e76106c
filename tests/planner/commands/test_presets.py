"""A preset stands for flags: it names them, gives way to the command line, and says what it would take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.common.units import GIB
from planner.estimates.presets import PRESETS
from tests.conftest import Outcome, one_line
from tests.paths import MIXTRAL, ROOT
from tests.planner.model.test_config_sizes import CONFIGS, write_config

Moeq = Callable[..., Outcome]

SERVICE = "--context 8192 --concurrency 4"
LINES = {
    "2bit": "--avg-bits 2",
    "2.5bit": "--avg-bits 2.5",
    "3bit": "--avg-bits 3",
    "24gb": f"--budget-gib 15.59 {SERVICE} --gpu-gib 24",
    "80gb": f"--budget-gib 66 {SERVICE} --gpu-gib 80",
}
"""Preset → the flags that it stands for with Mixtral 8x7B."""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of Mixtral 8x7B."""
    return write_config(tmp_path_factory.mktemp("presets") / "8x7b", CONFIGS["8x7b"])


def said(outcome: Outcome) -> str:
    """Return the line that names the flags of a preset."""
    assert outcome.code == 0, outcome.err
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("preset "))
    return line


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_a_set_of_flags(moeq: Moeq, mixtral: Path, name: str) -> None:
    by_name = moeq("plan", mixtral, "--dry-run", "--json", "--preset", name)
    by_flags = moeq("plan", mixtral, "--dry-run", "--json", *LINES[name].split())
    assert said(by_name) == f"preset {name}: {LINES[name]}"
    found, expected = json.loads(by_name.out), json.loads(by_flags.out)
    assert found.pop("needs") | {"ram_bytes": 0} == expected.pop("needs") | {"ram_bytes": 0}
    assert found == expected


@pytest.mark.parametrize("flags", ["", "--concurrency 1", "--context 1000", "--gpu-gib 14 --concurrency 2"])
def test_one_gpu_holds_it_and_no_more(moeq: Moeq, mixtral: Path, flags: str) -> None:
    command = f"--dry-run --json --bits 1,2,3,4 --preset 24gb {flags}"
    found = json.loads(moeq("plan", mixtral, *command.split()).out)
    serving, bit = found["serving"], found["weights"]["experts"] / 256 / 8
    assert serving["gpus"] == 1
    assert serving["gpu_bytes"] <= 0.9 * serving["gpu_gib"] * GIB < serving["gpu_bytes"] + bit + 0.01 * GIB


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("24gb", "--concurrency 4", "--budget-gib 15.59 --context 8192 --concurrency 4 --gpu-gib 24"),
        ("24gb", "--gpu-gib 48 --concurrency 8", "--budget-gib 33.19 --context 8192 --concurrency 8 --gpu-gib 48"),
    ],
)
def test_a_flag_that_is_given_counts_more(moeq: Moeq, mixtral: Path, name: str, flags: str, line: str) -> None:
    assert said(moeq("plan", mixtral, "--dry-run", "--preset", name, *flags.split())) == f"preset {name}: {line}"


@pytest.mark.parametrize("name", ["2bit", "24gb"])
@pytest.mark.parametrize("flags", ["--avg-bits 2.25", "--budget-gib 16"])
def test_it_excludes_the_numbers_that_it_stands_for(moeq: Moeq, mixtral: Path, name: str, flags: str) -> None:
    found = one_line(moeq("plan", mixtral, "--dry-run", "--preset", name, *flags.split()))
    assert f"--preset {name} and {flags.split()[0]}: expected one of them, found both" in found


@pytest.mark.parametrize(
    ("model", "flags", "would"),
    [
        ("8x22b", "--preset 24gb", "found 12.59 GiB, 90% of 24 GiB, less 2.00 GiB reserved and the cache of 4 requests "
         "of 8192 tokens; it takes 2 such GPUs (--tensor-parallel-size 2)"),
        ("8x7b", "--preset 80gb --concurrency 1000", "found 0 GiB, 90% of 80 GiB, less 2.00 GiB reserved and the cache "
         "of 1000 requests of 8192 tokens; it takes more than 16 such GPUs, or fewer requests"),
        ("8x7b", "--preset 24gb --bits 3,4", "expected room for 18.20 GiB (--bits 3), found 15.59 GiB"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_says_what_it_would_take(
    moeq: Moeq, tmp_path: Path, model: str, flags: str, would: str
) -> None:
    folder = write_config(tmp_path / model, CONFIGS[model])
    found = one_line(moeq("plan", folder, "--dry-run", *flags.split()))
    assert found.startswith(f"error: --preset {flags.split()[1]}: expected room for ")
    assert would in found


@pytest.mark.slow
def test_it_makes_the_plan_of_its_flags(moeq: Moeq, tmp_path: Path) -> None:
    plans: list[dict[str, Any]] = []
    for number, flags in enumerate(("--preset 2.5bit", "--avg-bits 2.5")):
        output = tmp_path / f"{number}.json"
        assert moeq("plan", MIXTRAL, *flags.split(), "-o", output).code == 0
        plans.append(json.loads(output.read_text()))
    assert plans[0]["experts"] == plans[1]["experts"]
    assert plans[0]["settings"] == plans[1]["settings"]
    dry = moeq("quantize", MIXTRAL, "--preset", "2.5bit", "--dry-run", "-o", tmp_path / "out")
    assert said(dry) == "preset 2.5bit: --avg-bits 2.5"


def test_the_readme_names_every_preset() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in text] == []

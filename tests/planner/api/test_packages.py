"""A command that lacks a package says so in one line, before it downloads or opens anything."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from planner.api.packages import ROWS, PackagesFor
from planner.cli import COMMANDS
from planner.common.install import DISTRIBUTIONS, install_line, require
from tests.conftest import Outcome, one_line
from tests.paths import MIXTRAL, ROOT
from tests.supply.requires import names, project, table
from vllm_moeq.format import UsageError

HELD_OUT = str(MIXTRAL / "held_out.txt")
COMMIT = 40 * "0"

HUB = "owner/name"
COMPARE = f"compare {HUB} --held-out {HELD_OUT} -o x"

LACKING = [
    (
        "datasets",
        f"quantize {HUB} --data wikitext2 -o x",
        "--data wikitext2: expected the package datasets",
        "calibrate",
    ),
    ("datasets", f"plan {HUB} --data a/b@{COMMIT}", f"--data a/b@{COMMIT}: expected the package", "calibrate"),
    ("datasets", f"calibrate {HUB} --data c4 -o x", "--data c4: expected the package datasets", "calibrate"),
    ("datasets", f"{COMPARE} --data c4", "--data c4: expected the package datasets", "calibrate"),
    ("transformers", f"quantize {HUB} --data {HELD_OUT} -o x", "--data: expected the package", "calibrate"),
    ("accelerate", f"quantize {HUB} --data {HELD_OUT} -o x", "--data: expected the package", "calibrate"),
    ("accelerate", f"plan {HUB} --data {HELD_OUT} --dry-run", "--data: expected the package", "calibrate"),
    ("transformers", COMPARE, "moeq compare: expected the package transformers", "calibrate"),
    ("lm_eval", f"{COMPARE} --tasks piqa", "tasks: expected the package lm-eval", "eval"),
    ("transformers", f"eval {HUB} --data {HELD_OUT}", "--data: expected the package transformers", "eval"),
    ("lm_eval", f"eval {HUB} --suite paper", "tasks: expected the package lm-eval", "eval"),
    ("vllm", f"eval {HUB} --tasks piqa --backend vllm", "--backend vllm: expected the package vLLM", "gpu"),
    ("vllm", f"serve {HUB}", "moeq serve: expected the package vLLM", "gpu"),
    ("ray", f"quantize {HUB} --ray -o x", "--ray: expected the package ray", "ray"),
    ("matplotlib", f"report {HUB} --png", "--png: expected the package matplotlib", "report"),
]
"""(module that is missing, command line, beginning of the error, extra that brings it)."""

Moeq = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download began")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.parametrize(("module", "line", "error", "extra"), LACKING)
def test_a_missing_package_is_named_before_a_download(
    moeq: Moeq, monkeypatch: pytest.MonkeyPatch, module: str, line: str, error: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    found = one_line(moeq(*line.split()))
    assert found.startswith(f"error: {error}")
    assert install_line(extra) in found


@pytest.mark.parametrize("command", ["quantize owner/name -o x --data", "eval owner/name --data"])
def test_parquet_needs_its_reader(moeq: Moeq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert one_line(moeq(*command.split(), path)).startswith(f"error: {path}: expected the package pyarrow, found none")


def test_what_a_command_can_do_without_is_noted_before_the_work(
    moeq: Moeq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = moeq("compare", tmp_path / "none", "--held-out", HELD_OUT, "-o", tmp_path / "out")
    note = f"note: there will be no plot: matplotlib is not installed: {install_line('report')}"
    assert [line for line in outcome.err.splitlines() if "plot" in line] == [note]


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError) as caught:
        require("--data", ("transformers", "torch", "accelerate"), "hf")
    assert str(caught.value) == (
        f"--data: expected the packages transformers and accelerate, found none of them installed: {install_line('hf')}"
    )


@pytest.mark.slow
def test_a_plain_installation_quantizes_and_says_how_to_serve(
    moeq: Moeq, monkeypatch: pytest.MonkeyPatch, mixtral_copy: Path, tmp_path: Path
) -> None:
    for name in {name for row in ROWS for name in row.packages}:
        monkeypatch.setitem(sys.modules, name, None)
    (mixtral_copy / "tokenizer.json").write_text("{}")
    outcome = moeq("quantize", mixtral_copy, "--group-size", "32", "--quantizer", "rtn", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert f"moeq serve {tmp_path / 'out'}" in outcome.out.replace("\n", "")
    for command in ("verify", "report"):
        assert moeq(command, tmp_path / "out").code == 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.extra}-{row.packages[0]}")
def test_an_extra_brings_what_a_row_asks_for(row: PackagesFor) -> None:
    assert set(row.commands) <= set(COMMANDS)
    brought = names(row.extra) | ({"pyarrow"} if "datasets" in names(row.extra) else set())
    assert {DISTRIBUTIONS.get(name, name).lower() for name in row.packages} <= brought


def imported(folder: Path) -> Iterator[str]:
    """Yield the packages that the files of a folder import."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (it.name.partition(".")[0] for it in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield str(node.module).partition(".")[0]


def test_every_package_that_is_imported_is_in_an_extra() -> None:
    theirs = set.intersection(*(set(found) for found in table().values()))
    known = names(*project()["optional-dependencies"]) | theirs
    brought = {"click", "pyarrow", "triton", "humming"}  # by typer, datasets, torch, and vLLM's humming-kernels
    ours = {"planner", "vllm_moeq", *sys.stdlib_module_names, *brought}
    found = {it for name in ("planner", "vllm_moeq") for it in imported(ROOT / name)} - ours
    assert {it.replace("_", "-") for it in found} <= known

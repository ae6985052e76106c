"""The demo: what it compares, what it chooses, and a whole run of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from benchmarks.demo import WAYS, Measured, best, table
from planner.cli import app
from tests.paths import MIXTRAL, ROOT

GROUP: Any = typer.main.get_command(app)


def measured(name: str, perplexity: float, kl: float) -> Measured:
    return Measured(name, Path(name), 2.5, 3 << 20, perplexity, kl)


FOUND = [measured("original", 12.0, 0.0), measured("rule", 16.0, 0.25), measured("with a text", 12.5, 0.03125)]


def test_the_least_divergence_is_served() -> None:
    assert best(FOUND).name == "with a text"
    assert best([*FOUND, measured("other", 12.4, 0.0625)]).name == "with a text"
    assert best(FOUND[:2]).name == "rule"


def test_all_folders_stand_side_by_side() -> None:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(FOUND))
    lines = capture.get().splitlines()
    row = next(line for line in lines if "with a text" in line)
    assert [cell.strip() for cell in re.split("[│|]", row)[1:-1]] == [
        "with a text",
        "2.5",
        "3.00 MiB",
        "12.50",
        "0.0312",
    ]
    assert all(any(it.name in line for line in lines) for it in FOUND)


def test_the_command_takes_the_flags_of_every_way() -> None:
    for way in WAYS:
        GROUP.commands["quantize"].make_context("quantize", [str(MIXTRAL), *way.flags, "--avg-bits", "2.5", "-o", "x"])


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.full
def test_the_whole_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "demo.py"), "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    divergences = [float(found) for found in re.findall(r"^KL divergence ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(divergences) == len(WAYS)
    assert divergences[1] < divergences[0] / 3
    assert "the server is stopped" in done.stdout
    assert (tmp_path / f"{MIXTRAL.name}-2.5bit-{WAYS[1].suffix}" / "report.html").exists()

"""The scripts of docs/examples that need no server, and README's lines in Python, do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import planner
from tests.paths import CALIBRATION_TEXT, MIXTRAL, ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the examples name: the shipped Mixtral, and the beginnings of two texts."""
    (tmp_path / "MODEL").symlink_to(MIXTRAL)
    (tmp_path / "text.jsonl").write_text("".join(CALIBRATION_TEXT.read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "test.txt").write_text((MIXTRAL / "held_out.txt").read_text()[:2000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *arguments: str) -> list[str]:
    """Run an example and return the lines that it prints; it prints nothing else."""
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_quantize(folder: Path) -> None:
    *_, last = run("quantize.py", "MODEL", "text.jsonl", "test.txt", "2.5bit")
    assert last.startswith("2.5 bits, perplexity ")
    assert last.endswith("; serve it with: moeq serve 2.5bit")
    assert (folder / "2.5bit" / "evaluation.json").is_file()


def test_compare_widths(folder: Path) -> None:
    *_, header, rule, original, two, more, three = run("compare_widths.py", "MODEL", "text.jsonl", "test.txt", "widths")
    assert header.startswith("| bits | MiB |")
    assert rule.count("|") == header.count("|")
    assert [row.split(" | ")[0] for row in (original, two, more, three)] == ["| 16", "| 2", "| 2.5", "| 3"]
    assert (folder / "widths" / "compare.md").is_file()


@pytest.mark.parametrize("name", ["quantize.py", "compare_widths.py"])
def test_without_arguments_an_example_says_what_it_takes(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"python {name} MODEL calibration.jsonl held_out.txt OUTPUT" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_lines_of_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, section = (ROOT / "README.md").read_text().split("\n## In Python\n")
    lines = [line.strip() for line in section.split("\n## ")[0].splitlines() if line.startswith("    ")]
    exec("\n".join(lines), {"planner": planner})
    bits, perplexity, kl = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert bits == 2.5
    assert perplexity > 5
    assert kl > 0
    assert (folder / "DIR" / "config.json").is_file()

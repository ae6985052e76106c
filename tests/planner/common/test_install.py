"""What users are told to install: an extra that exists, from a clone, in messages, cards and documents alike."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from planner.api.packages import ROWS
from planner.common.install import install_command, install_line
from planner.common.progress import Progress
from planner.comparison.report import write_plot
from tests.paths import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
FROM_AN_INDEX = re.compile(r"pip install (?:--?\S+ )*'?vllm-moeq")
NAMED = re.compile(r"install_(?:line|command)\([\"'](\w+)[\"']\)|pip install '\.(?:/vllm-moeq)?\[([\w,]+)\]'")


def texts() -> dict[str, str]:
    """Return the code and the documents, without the tests and the history."""
    folders = [ROOT / name for name in ("planner", "vllm_moeq", "docs", "requirements", "benchmarks")]
    paths = [path for folder in folders for kind in ("py", "md", "sh") for path in folder.rglob(f"*.{kind}")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *paths]}


def test_nothing_is_installed_from_an_index() -> None:
    assert [name for name, text in texts().items() if FROM_AN_INDEX.search(text)] == []


def test_every_extra_that_is_named_exists() -> None:
    named = {extra for text in texts().values() for pair in NAMED.findall(text) for extra in "".join(pair).split(",")}
    named |= {row.extra for row in ROWS}
    assert {"gpu", "hf", "eval", "calibrate", "ray", "report"} <= named <= set(EXTRAS)


def test_the_lines() -> None:
    assert install_command() == "pip install ."
    assert install_line("eval") == "pip install '.[eval]' in a clone of vllm-moeq"


def test_a_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_plot(tmp_path / "compare.png", [], Progress())
    assert capsys.readouterr().err == f"no plot: it needs matplotlib, {install_line('report')}\n"
    assert list(tmp_path.iterdir()) == []

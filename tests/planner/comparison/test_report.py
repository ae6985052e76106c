"""The tables of a comparison: means, tails, fallbacks, and what a row lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.comparison.report import plot, tables

ORIGINAL = {"method": "original", "perplexity": 9.0}


def row(method: str, average: float, seed: int, fallbacks: int | None = None, **more: Any) -> dict[str, Any]:
    scores = {"perplexity": 10.0, "perplexity_error": 0.1, "kl": 0.25, "kl_error": 0.01, "kl_99": 2.0, "kl_max": 5.0}
    own = {"method": method, "average": average, "seed": seed, "odp": 0.0, "cost": {}, "fallbacks": fallbacks}
    return {**scores, **own, **more}


def lines(rows: list[dict[str, Any]], title: str) -> list[list[str]]:
    (found,) = [lines for name, _, lines in tables([ORIGINAL, *rows]) if name.startswith(title)]
    return found


def test_the_tail_stands_beside_the_mean() -> None:
    rows = [row("kl", 2.0, 0), row("random", 2.0, 0), row("random", 2.0, 1, kl_99=3.0, kl_max=6.5), row("kl", 3.0, 0)]
    assert lines(rows, "KL divergence") == [
        ["kl", "0.25000 ± 0.01000", "0.25000 ± 0.01000"], ["random", "0.25000 ± 0.00000", ""],
    ]  # fmt: skip
    assert lines(rows, "99th") == [["kl", "2.0000", "2.0000"], ["random", "2.5000 ± 0.7071", ""]]
    assert lines(rows, "Largest") == [["kl", "5.000", "5.000"], ["random", "5.750 ± 1.061", ""]]


def test_fallbacks_are_counted_where_something_is_calibrated() -> None:
    rows = [row("uniform", 2.0, 0), row("slim", 2.0, 0, fallbacks=3), row("slim", 2.0, 1, fallbacks=0)]
    assert lines(rows, "Experts that fell back") == [["uniform", ""], ["slim", "2 ± 2"]]
    assert not [title for title, _, _ in tables([ORIGINAL, *rows[:1]]) if title.startswith("Experts")]


def test_a_method_without_tasks_keeps_its_other_scores() -> None:
    original = {**ORIGINAL, "tasks": {"copa acc": [0.6, 0.05]}}
    rows = [original, row("kl", 2.0, 0, tasks={"copa acc": [0.5, 0.05]}), row("slim", 2.0, 0)]
    found = {title: lines for title, _, lines in tables(rows)}
    assert found["copa acc (original 0.6000)"] == [["kl", "0.5000 ± 0.0500"], ["slim", ""]]
    assert found["Perplexity (original 9.000)"][1] == ["slim", "10.000 ± 0.100"]


def test_schemes_differ_in_the_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    of_two = [row("kl", bits, 0, scheme=scheme) for scheme in ("grid", "trellis") for bits in (2.0, 3.0)]
    plot([ORIGINAL, *of_two], tmp_path / "p.png")
    plot([ORIGINAL, *of_two[:2]], tmp_path / "p.png")
    both, alone = ({it.get_label(): it[0].get_linestyle() for it in one.axes[0].containers} for one in drawn)
    assert both == {"kl, grid": "-", "kl, trellis": "--"}
    assert alone == {"kl": "-"}

"""Write the tables of a comparison as Markdown, CSV and JSON, and plot quality against bits."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.common.install import install_line
from planner.common.progress import Progress
from planner.common.shown import add_row
from planner.comparison.compare import Row
from planner.comparison.evaluate import ORIGINAL
from planner.comparison.request import Comparison
from planner.output.files import atomic, make_new, write_json
from planner.planning.methods import METHODS, OURS
from vllm_moeq.format import GRID

Value = tuple[float, float]
"""(mean over seeds, spread). The spread is the standard deviation over seeds, or with one seed the standard error."""

COLUMNS = (
    "method", "scheme", "average", "achieved", "stored", "seed", "odp", "bytes", "perplexity", "perplexity_error", "kl",
    "kl_error", "kl_median", "kl_99", "kl_max", "same_top", "tokens", "fallbacks",
)  # fmt: skip


def cell(rows: Sequence[Row], name: str) -> Value:
    """Return a score from the rows of one method and average, one row per seed."""
    values = [row[name] for row in rows]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values)
    return values[0], rows[0].get(f"{name}_error", 0.0)


def task_cell(rows: Sequence[Row], task: str) -> Value:
    """Return a task's score from the rows of one method and average, one row per seed."""
    values = [row["tasks"][task][0] for row in rows]
    error = rows[0]["tasks"][task][1] or 0.0
    return (statistics.mean(values), statistics.stdev(values)) if len(values) > 1 else (values[0], error)


def line_of(row: Row) -> str:
    """Return the name of a row's line in tables and plot: its method, and its scheme unless that is the grid."""
    scheme = row.get("scheme", GRID.name)
    return str(row["method"]) if scheme == GRID.name else f"{row['method']}, {scheme}"


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float], dict[float, list[Row]]]:
    """Return (:func:`line_of`, ODP threshold) → average → rows of all seeds."""
    found: dict[tuple[str, float], dict[float, list[Row]]] = {}
    for row in rows:
        if row["method"] != ORIGINAL:
            found.setdefault((line_of(row), row["odp"]), {}).setdefault(row["average"], []).append(row)
    return found


@dataclass(frozen=True)
class Shown:
    """A table with a line per method and a column per average.

    Attributes:
        title: its title.
        value: a function that returns a cell's value and spread from the rows of all seeds; no value leaves the cell
            empty, no spread is not shown.
        digits: digits after the point.
    """

    title: str
    value: Callable[[Sequence[Row]], tuple[float, float | None] | None]
    digits: int

    def text(self, rows: Sequence[Row]) -> str:
        """Return a cell."""
        found = self.value(rows) if rows else None
        if found is None:
            return ""
        value, spread = found
        return f"{value:.{self.digits}f}" + ("" if spread is None else f" ± {spread:.{self.digits}f}")


def tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, header, lines) for every table."""
    groups = grouped(rows)
    averages = sorted({average for found in groups.values() for average in found})
    header = ["method", *(f"{average:g} bits" for average in averages)]
    result = []
    for shown in _shown(rows):
        lines = [[_label(*key), *(shown.text(found.get(a, ())) for a in averages)] for key, found in groups.items()]
        result.append((shown.title, header, lines))
    return [*result, _cost_table(groups)]


def _shown(rows: Sequence[Row]) -> list[Shown]:
    """Return the tables that the rows have values for."""
    original = rows[0]
    found = [
        Shown(f"Perplexity (original {original['perplexity']:.3f})", lambda of: cell(of, "perplexity"), 3),
        Shown("KL divergence to the original, nats per token", lambda of: cell(of, "kl"), 5),
        Shown("99th percentile of the KL divergence over tokens, nats", lambda of: seeds(of, "kl_99"), 4),
        Shown("Largest KL divergence of any token, nats", lambda of: seeds(of, "kl_max"), 3),
    ]
    if len({row["scheme"] for row in rows if "scheme" in row}) > 1:
        found.insert(0, Shown("Stored bits per expert weight, with scales", lambda of: seeds(of, "stored"), 3))
    if any(row.get("fallbacks") is not None for row in rows):
        found.append(Shown("Experts that fell back from calibration", lambda of: seeds(of, "fallbacks"), 0))
    for task, (value, _) in original.get("tasks", {}).items():
        found.append(Shown(f"{task} (original {value:.4f})", partial(_task, task), 4))
    return found


def seeds(rows: Sequence[Row], name: str) -> tuple[float, float | None] | None:
    """Return a number's mean over seeds and its deviation among several; None if a row lacks it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if len(values) < len(rows):
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _task(task: str, rows: Sequence[Row]) -> Value | None:
    return task_cell(rows, task) if "tasks" in rows[0] else None


def _label(method: str, odp: float) -> str:
    return f"{method}, ODP {odp:g}" if odp else method


def _cost_table(
    groups: dict[tuple[str, float], dict[float, list[Row]]],
) -> tuple[str, list[str], list[list[str]]]:
    """Return the table of the cost of choosing widths: the maximum over each method's rows."""
    lines = []
    for (method, odp), found in groups.items():
        costs = [row["cost"] for rows in found.values() for row in rows]
        if odp or not all(costs):
            continue
        seconds, size = (max(cost[name] for cost in costs) for name in ("seconds", "bytes"))
        lines.append([method, f"{seconds:.2f}", f"{size / 2**20:.0f}", "yes" if costs[0]["forward_passes"] else "no"])
    return "Choosing the widths", ["method", "seconds", "MiB of memory", "reads a text"], lines


def markdown(rows: Sequence[Row], wanted: Comparison, model: str) -> str:
    """Return all tables in Markdown, after a summary of the settings."""
    settings = wanted.settings
    lines = [
        f"# {Path(model).name}: methods compared",
        "",
        f"Widths {_widths(wanted)}; {_schemes(wanted)}{settings.quantizer}, {settings.one_bit} at one bit, "
        f"groups of {settings.group_size}, other linears at {' or '.join(map(str, settings.linear.choices))} bits. "
        f"{rows[0]['tokens']:,} held-out tokens, windows of {wanted.window}.",
    ]
    if wanted.data is not None:
        lines.append(f"Calibration: {wanted.samples} × {wanted.length} tokens of {Path(wanted.data).name}.")
    several = f"deviation over {wanted.seeds} seeds where a method depends on one, else standard "
    lines.append(f"±: standard {several if wanted.seeds > 1 else ''}error over windows of the held-out text.")
    for title, header, body in tables(rows):
        lines += ["", f"## {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, body)]
    return "\n".join(lines) + "\n"


def _widths(wanted: Comparison) -> str:
    """Return a phrase with the widths that the methods choose from."""
    if wanted.bit_choices is not None:
        return ", ".join(map(str, wanted.bit_choices))
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in wanted.methods:
        groups.setdefault(METHODS[name].choices, []).append(name)
    parts = sorted(groups.items(), key=lambda group: len(group[1]))
    texts = [f"{', '.join(map(str, widths))} for {', '.join(names)}" for widths, names in parts[:-1]]
    return "; ".join([*texts, f"{', '.join(map(str, parts[-1][0]))}{' for the others' if texts else ''}"])


def _schemes(wanted: Comparison) -> str:
    """Return a phrase with the schemes, where they are not grids alone."""
    return "" if wanted.schemes == (GRID.name,) else f"experts stored as {' and as '.join(wanted.schemes)}; "


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV."""
    file = io.StringIO()
    tasks = list(rows[0].get("tasks", {}))
    writer = csv.DictWriter(
        file, [*COLUMNS, "seconds", "added_bytes", *tasks], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        cost = row.get("cost", {})
        more = {"seconds": cost.get("seconds"), "added_bytes": cost.get("bytes")}
        writer.writerow({**row, **more, **{task: value for task, (value, _) in row.get("tasks", {}).items()}})
    return file.getvalue()


LINES = ("-", "--", ":")
"""Styles of lines: each scheme its own, where several are compared."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot KL divergence and perplexity against stored bits, with one line per method and scheme.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    names = ("kl", "perplexity")
    titles = ("KL divergence to the original (nats per token)", "perplexity")
    schemes = list(dict.fromkeys(row.get("scheme", GRID.name) for row in rows if row["method"] != ORIGINAL))
    for axes, name, title in zip(figure.subplots(1, 2), names, titles, strict=True):
        for number, (key, found) in enumerate(grouped(rows).items()):
            points = sorted((seeds(of, "stored") or (average,), *cell(of, name)) for average, of in found.items())
            x, y, error = zip(*((at[0], *rest) for at, *rest in points), strict=True)
            first = next(iter(found.values()))[0]
            ours, scheme = first["method"] == OURS, first.get("scheme", GRID.name)
            style: dict[str, Any] = {"color": "black", "linewidth": 2.5, "zorder": 9} if ours else {"linewidth": 1.2}
            marker, line = "osD^vP*X<>hp"[number % 12], "--" if number >= 10 and not ours else "-"
            label = _label(*key)
            if len(schemes) > 1:
                line = LINES[schemes.index(scheme) % len(LINES)]
                label += f", {GRID.name}" if scheme == GRID.name else ""
            axes.errorbar(x, y, yerr=error, label=label, marker=marker, linestyle=line, markersize=4, **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.set_xlabel("stored bits per expert weight, with scales")
        axes.set_ylabel(title)
        axes.grid(visible=True, which="both", alpha=0.25)
    if rows[0]["perplexity"]:
        axes.axhline(rows[0]["perplexity"], color="grey", linestyle=":", label="original")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)


def write_report(output: Path, rows: Sequence[Row], wanted: Comparison, model: str, progress: Progress) -> None:
    """Write compare.md, compare.csv and compare.json into a new folder, and compare.png if matplotlib is installed.

    Raises:
        CheckpointError: a full disk, or somebody made the folder meanwhile.
    """
    make_new(output)
    texts = {"compare.md": markdown(rows, wanted, model), "compare.csv": as_csv(rows)}
    for name, text in texts.items():
        with atomic(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_json(output / "compare.json", json.loads(json.dumps(rows)))
    write_plot(output / "compare.png", rows, progress)


def write_plot(path: Path, rows: Sequence[Row], progress: Progress) -> None:
    """Write the plot, or say in a line what it needs.

    Raises:
        CheckpointError: a full disk.
    """
    try:
        with atomic(path) as temporary:
            drawn = temporary.with_suffix(".png")
            plot(rows, drawn)
            drawn.replace(temporary)
    except ModuleNotFoundError:
        progress.line(f"no plot: it needs matplotlib, {install_line('report')}")


def print_rows(rows: Sequence[Row]) -> None:
    """Print the tables."""
    for title, header, lines in tables(rows):
        table = Table(*header, title=title)
        for line in lines:
            add_row(table, *line)
        Console().print(table)

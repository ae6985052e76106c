"""This part measures quality against bits for two widths to choose from: the paper's Figures 2, 7 and 8."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.replication.paper.common import Bench, Result, conditions, pivots
from benchmarks.replication.paper.tables import TWO_LEVEL_BITS
from planner.comparison.compare import Row
from planner.comparison.entries import Entry
from planner.comparison.report import cell, grouped
from planner.quantization.settings import QuantizeSettings

FIGURE8_BITS = ("1.25", "1.375", "1.5", "1.625", "1.75")
METHODS = {
    "router norm": "router-norm",
    "router norm + MaxVar": "router-norm-maxvar",
    "frequency": "frequency",
    "weight": "weight",
    "pmq": "pmq",
    "kl": "kl",
}
CHANGES = {"router norm change": "router-norm", "router norm change + MaxVar": "router-norm-maxvar"}
"""The same rules by the change of norm during training, where the model has its initial router."""

STYLES: dict[str, dict[str, object]] = {
    "router norm": {"color": "tab:blue", "marker": "o"},
    "router norm change": {"color": "tab:blue", "marker": "x", "linestyle": "--"},
    "router norm + MaxVar": {"color": "tab:red", "marker": "s"},
    "router norm change + MaxVar": {"color": "tab:red", "marker": "+", "linestyle": "--"},
    "frequency": {"color": "tab:green", "marker": "D"},
    "weight": {"color": "tab:olive", "marker": "^"},
    "pmq": {"color": "tab:purple", "marker": "v"},
    "kl": {"color": "black", "marker": "P"},
    "random": {"color": "grey", "marker": "<", "linestyle": ":"},
    "uniform": {"color": "tab:orange", "marker": "*", "linestyle": "none", "markersize": 11},
}
"""One colour for a rule, dashed for its variant: their lines often lie on each other."""


def figure2(bench: Bench) -> Result:
    """HQQ, a group per row and 8-bit linears, as in the paper's experiments on Switch Transformer."""
    settings = bench.settings("hqq", linear_bits=8, group_size=-1)
    return _figure(bench, "figure2", "Figure 2: choices 2, 3 with HQQ", (2, 3), bench.some(TWO_LEVEL_BITS), settings)


def figure7(bench: Bench) -> Result:
    """The quantizer of the other tables, choices 2 and 3."""
    return _figure(bench, "figure7", "Figure 7: choices 2, 3", (2, 3), bench.some(TWO_LEVEL_BITS))


def figure8(bench: Bench) -> Result:
    """The quantizer of the other tables, choices 1 and 2."""
    return _figure(bench, "figure8", "Figure 8: choices 1, 2", (1, 2), bench.some(FIGURE8_BITS))


def _figure(
    bench: Bench,
    name: str,
    title: str,
    choices: tuple[int, ...],
    averages: tuple[Fraction, ...],
    settings: QuantizeSettings | None = None,
) -> Result:
    found = _entries(bench, choices, averages)
    rows = bench.rows(found, settings)
    _draw(rows, title, bench.output / f"{name}.png")
    lines = [conditions(bench, settings, seeds=True), "", *pivots(rows), _moved(found)]
    if bench.initial is None:
        lines += ["", "The model has no initial router: no rows for the change of norm."]
    return Result(title, lines, rows, [f"{name}.png"])


def _entries(bench: Bench, choices: tuple[int, ...], averages: tuple[Fraction, ...]) -> list[Entry]:
    """Return all lines of a figure, and the uniform widths at its ends."""
    found = [bench.entry(label, average, choices, method) for label, method in METHODS.items() for average in averages]
    if bench.initial is not None:
        found += [
            bench.entry(label, average, choices, method, initial_model=bench.initial)
            for label, method in CHANGES.items()
            for average in averages
        ]
    found += [
        bench.entry("random", average, choices, "random", seed)
        for seed in range(bench.asked.seeds)
        for average in averages
    ]
    return found + [bench.entry("uniform", Fraction(bits), (bits,), "uniform") for bits in choices]


def _draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw KL divergence and perplexity against average bits, a line per rule."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    names = {"kl": "KL divergence to the original (nats per token)", "perplexity": "perplexity"}
    for axes, (name, label) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for (method, _), by_average in grouped(rows).items():
            points = sorted((average, *cell(same, name)) for average, same in by_average.items())
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=error, label=method, capsize=2, **{"markersize": 6, **STYLES[method]})
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # the range is often less than a decade
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("average bits per expert weight")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
    axes.axhline(rows[0]["perplexity"], color="black", linewidth=0.8, linestyle=":", label="original")
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=130)


def _moved(found: list[Entry]) -> str:
    """Say which part of the experts MaxVar moves up; the same at every average."""
    parts = []
    for label in ("router norm + MaxVar", "router norm change + MaxVar"):
        plan = next((entry.plan for entry in found if entry.method == label and entry.plan), None)
        if plan is not None:
            moved, experts = sum(map(len, plan.promoted.values())), sum(map(len, plan.experts.values()))
            parts.append(f"{label}: {moved} of {experts} experts ({moved / experts:.1%}) moved up")
    return "; ".join(parts) + "."

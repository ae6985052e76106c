"""This module draws the paper's Figures 4, 5 and 6 from trained models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.replication.theory.bits import Bits
from benchmarks.replication.theory.checks import Run

RARE, PREVALENT = "tab:blue", "tab:red"
Point = tuple[float, list[float]]
"""α and the values of all seeds."""


def axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Return an empty plot."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    found = figure.subplots()
    found.set(title=title, xlabel=x, ylabel=y)
    found.grid(alpha=0.3)
    return figure, found


def by_alpha(runs: Sequence[Run], values: Sequence[float | None]) -> list[Point]:
    """Gather the values of all seeds of each α."""
    found: dict[float, list[float]] = {run.alpha: [] for run in sorted(runs, key=lambda run: run.alpha)}
    for run, value in zip(runs, values, strict=True):
        if value is not None:
            found[run.alpha].append(value)
    return [(alpha, values) for alpha, values in found.items() if values]


def line(on: Axes, points: Sequence[Point], label: str, color: str, marker: str) -> None:
    """Draw the mean over seeds with the range as bars."""
    middle = [sum(values) / len(values) for _, values in points]
    low = [mean - min(values) for mean, (_, values) in zip(middle, points, strict=True)]
    high = [max(values) - mean for mean, (_, values) in zip(middle, points, strict=True)]
    x = [alpha for alpha, _ in points]
    on.set_xticks(x)
    on.errorbar(x, middle, yerr=[low, high], label=label, color=color, marker=marker, capsize=3)


def figure4(run: Run, path: Path) -> None:
    """Draw the routers' projections on o_1 for the experts of class 1, by increasing change of norm."""
    title = f"Figure 4: routers of S₊, α = {run.alpha:g}, seed {run.seed}"
    figure, on = axes(title, "change of the router's norm (experts in ascending order)", "projection on o₁")
    order = sorted((s for s, name in enumerate(run.names) if name.endswith("o1")), key=lambda s: run.norm_change[s])
    for name, color in (("o1", RARE), ("-o1", PREVALENT)):
        places = [place for place, s in enumerate(order) if run.names[s] == name]
        bars = on.bar(places, [run.projection[order[place]] for place in places], color=color,
                      label=f"aligned with {name.replace('o1', 'o₁').replace('-', '−')}")  # fmt: skip
        on.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    on.set_xticks(range(len(order)), [f"{run.norm_change[s]:.2f}" for s in order])
    on.margins(y=0.1)
    on.axhline(0, color="black", linewidth=0.8)
    on.legend(loc="lower left")
    figure.savefig(path, dpi=100)


def figure5(runs: Sequence[Run], path: Path) -> None:
    """Draw the least ratio of activations of class 1 against α, and the bound of eq. 10."""
    figure, on = axes("Figure 5: activation of prevalent over rare experts", "α", "least ratio over pairs of S₊")
    line(on, by_alpha(runs, [run.ratio("o1") for run in runs]), "measured", "black", "o")
    line(on, by_alpha(runs, [run.bound for run in runs]), "bound (1 − 2α)/(2α)", "tab:orange", "x")
    on.set_yscale("log")
    on.legend()
    figure.savefig(path, dpi=100)


def figure6(runs: Sequence[Run], neuron: Sequence[Bits], equal: Sequence[Bits], path: Path) -> None:
    """Draw b_h − b_l against α with a range per neuron and one range for all, and the logarithm of the bound."""
    figure, on = axes("Figure 6: bits that prevalent experts can do without", "α", "b_h − b_l")
    line(on, by_alpha(runs, [bits.gap for bits in neuron]), "range of each neuron (eq. 2)", "black", "o")
    line(on, by_alpha(runs, [bits.gap for bits in equal]), "one range for all neurons", "tab:green", "s")
    line(on, by_alpha(runs, [math.log2(run.bound) for run in runs]), "log₂((1 − 2α)/(2α))", "tab:orange", "x")
    on.legend()
    figure.savefig(path, dpi=100)

"""This module writes the tables of the synthetic experiment, over all seeds of an α."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.replication.paper.common import markdown_table
from benchmarks.replication.theory.bits import Bits
from benchmarks.replication.theory.checks import Run, violations
from benchmarks.replication.theory.model import Setting

Measured = tuple[Run, Bits, Bits]
"""Widths with a range per neuron, and with one range for all neurons."""


def span(values: Sequence[float], digits: int = 2) -> str:
    """Return the least and the largest value as text."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} – {high}"


def widths(found: Sequence[Bits], part: str) -> str:
    """Return a part of Bits of each seed; a dash where no width is enough."""
    values = [getattr(bits, part) for bits in found]
    return ", ".join("–" if value is None else str(value) for value in values)


def split(runs: Sequence[Run], field: str, rare: bool) -> list[float]:
    """Return a field of Run of all experts aligned with less, or with more prevalent tokens."""
    return [
        value
        for run in runs
        for value, name in zip(getattr(run, field), run.names, strict=True)
        if name.startswith("o") == rare
    ]


def figure4_row(runs: Sequence[Run]) -> list[str]:
    """Return what Lemma 4.3 (i) and (ii) are about."""
    row = [span([*split(runs, field, True), *split(runs, field, False)]) for field in ("own_before", "own", "opposite")]
    row += [span(split(runs, "gate", rare)) for rare in (True, False)]
    row += [span(split(runs, field, rare)) for field in ("projection", "norm_change") for rare in (True, False)]
    return row


def figure5_row(runs: Sequence[Run]) -> list[str]:
    """Return what Lemma 4.3 (iii) is about."""
    activations = [span(split(runs, "activation", rare), 0) for rare in (True, False)]
    return [*activations, *(span([run.ratio(name) for run in runs]) for name in ("o1", "o2")), f"{runs[0].bound:.2f}"]


def figure6_row(runs: Sequence[Run], neuron: Sequence[Bits], equal: Sequence[Bits]) -> list[str]:
    """Return what Theorem 4.4 is about."""
    row = [f"{math.log2(runs[0].bound):.2f}"]
    for found in (neuron, equal):
        row += [widths(found, part) for part in ("high", "low", "gap", "swapped")]
    return [*row, span([min(split([run], "variance", False)) / max(split([run], "variance", True)) for run in runs], 0)]


FIGURE4 = ("p of own token before", "after", "p of its negative", "least gate, rare", "prevalent",
           "router on o, rare", "prevalent", "norm change, rare", "prevalent")  # fmt: skip
FIGURE5 = ("σ rare", "σ prevalent", "least ratio, class 1", "class 2", "bound")
FIGURE6 = ("bound", "b_h", "b_l", "b_h − b_l", "rare experts' least", "one range: b_h", "b_l", "b_h − b_l",
           "rare experts' least", "MaxVar, prevalent/rare")  # fmt: skip


def tables(measured: Sequence[Measured]) -> list[str]:
    """Return a table per figure, a row per α."""
    alphas = sorted({run.alpha for run, *_ in measured})
    groups = [tuple(zip(*(found for found in measured if found[0].alpha == alpha), strict=True)) for alpha in alphas]
    starts = [[f"{runs[0].alpha:g}", str(runs[0].steps)] for runs, *_ in groups]
    lines = []
    for title, header, rows in (
        ("Figure 4, Lemma 4.3 (i) and (ii)", FIGURE4, [figure4_row(runs) for runs, *_ in groups]),
        ("Figure 5, Lemma 4.3 (iii)", FIGURE5, [figure5_row(runs) for runs, *_ in groups]),
        ("Figure 6, Theorem 4.4", FIGURE6, [figure6_row(*group) for group in groups]),
    ):
        body = [[*start, *row] for start, row in zip(starts, rows, strict=True)]
        lines += [f"## {title}", "", *markdown_table(("α", "steps", *header), body), ""]
    return lines


def readme(setting: Setting, measured: Sequence[Measured], command: str, seconds: float) -> str:
    """Return README.md."""
    found = [text for run, *_ in measured for text in violations(run)]
    failed = sum(bool(violations(run)) for run, *_ in measured)
    wrong = max(bits.full_error for _, bits, _ in measured)
    lines = [
        "# The synthetic experiment of Appendix A",
        "",
        f"    {command}",
        "",
        f"{seconds:.0f} s. {setting}",
        "",
        f"Rare: experts aligned with o₁ or o₂; prevalent: with −o₁ or −o₂. {len(measured)} runs; widths have an entry",
        f"per seed, other cells the range over seeds and experts. Largest test error without quantization: {wrong:g}.",
        "",
        f"**Lemma 4.3 holds in {len(measured) - failed} of {len(measured)} runs.**",
        *(f"- {text}" for text in found),
        "",
        *tables(measured),
        *(f"![Figure {number}](theory-figure{number}.png)" for number in (4, 5, 6)),
    ]
    return "\n".join(lines) + "\n"

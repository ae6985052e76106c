"""This module writes the Markdown tables and the plot of :mod:`benchmarks.replication.switch.run`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.replication.paper.common import markdown_table

Row = dict[str, Any]

STYLES: dict[str, dict[str, Any]] = {
    "change": {"color": "tab:blue", "marker": "o"},
    "change + MaxVar": {"color": "tab:red", "marker": "s"},
    "norm": {"color": "tab:blue", "marker": "x", "linestyle": "--"},
    "norm + MaxVar": {"color": "tab:red", "marker": "+", "linestyle": "--"},
    "frequency": {"color": "tab:green", "marker": "D"},
    "weight": {"color": "tab:olive", "marker": "^"},
    "random": {"color": "grey", "marker": "<", "linestyle": ":"},
    "uniform": {"color": "tab:orange", "marker": "*", "linestyle": "none", "markersize": 12},
}
"""One colour for a rule, dashed for its variant: their lines often lie on each other."""


def mixed(rows: Iterable[Row], start: str, choices: Sequence[int]) -> dict[str, dict[float, list[Row]]]:
    """Return method → average → rows, of those with experts quantized to some widths."""
    found: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        if row["start"] == start and row["method"] in STYLES and min(choices) <= row["average"] <= max(choices):
            found.setdefault(row["method"], {}).setdefault(row["average"], []).append(row)
    return found


def scores_table(rows: Sequence[Row], start: str, choices: Sequence[int]) -> list[str]:
    """Return ROUGE-2 and loss, a line per method and a column per average."""
    by_method = mixed(rows, start, choices)
    averages = sorted({average for columns in by_method.values() for average in columns})
    lines: list[str] = []
    for title, name, digits in (("ROUGE-2", "rouge2", 2), ("loss, nats per target token", "loss", 4)):
        body = [
            [method, *(_cell(columns.get(average, []), name, digits) for average in averages)]
            for method, columns in by_method.items()
        ]
        whole = [f"{row['method']} {_cell([row], name, digits)}" for row in rows if _whole(row, start)]
        header = [title, *(f"{average:g} bits" for average in averages)]
        lines += [*markdown_table(header, body), "", "; ".join(whole) + ".", ""]
    return lines


def _whole(row: Row, start: str) -> bool:
    return bool(row["start"] == start and row["method"] not in STYLES)


def _cell(rows: Sequence[Row], name: str, digits: int) -> str:
    """Return the value with its interval; of several seeds their mean and standard deviation."""
    if not rows:
        return ""
    values = [row[name] for row in rows]
    if len(rows) > 1:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    if name == "rouge2":
        return f"{values[0]:.{digits}f} [{rows[0]['rouge2_low']:.1f}, {rows[0]['rouge2_high']:.1f}]"
    return f"{values[0]:.{digits}f}"


def differences_table(rows: Sequence[Row]) -> list[str]:
    """Return how far every method is from the paper's."""
    body = [
        [
            row["method"],
            f"{row['rouge2']:+.2f} [{row['rouge2_low']:+.2f}, {row['rouge2_high']:+.2f}]",
            f"{row['loss']:+.4f} [{row['loss_low']:+.4f}, {row['loss_high']:+.4f}]",
        ]
        for row in rows
    ]
    return markdown_table(["method − (change + MaxVar)", "ROUGE-2", "loss"], body)


def correlations_table(rows: Sequence[Row]) -> list[str]:
    """Return the paper's Table 3: a column per MoE layer."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    body = []
    for since in dict.fromkeys(row["since"] for row in rows):
        for name, label in (("spearman", "Spearman's ρ"), ("kendall", "Kendall's τ")):
            values = {row["layer"]: row[name] for row in rows if row["since"] == since}
            body.append([since, label, *(f"{values[layer]:.4f}" if layer in values else "" for layer in layers)])
    return markdown_table(["routers before", "", *map(short, layers)], body)


def experts_table(rows: Sequence[Row]) -> list[str]:
    """Return the range of every score in every layer."""
    names = {"norm": "final norm", "change": "change of norm", "max_var": "MaxVar", "tokens": "share of tokens"}
    body = []
    for start, layer in dict.fromkeys((row["start"], row["layer"]) for row in rows):
        mine = [row for row in rows if (row["start"], row["layer"]) == (start, layer)]
        total = sum(row["tokens"] for row in mine)
        cells = []
        for name in names:
            values = sorted(row[name] / (total if name == "tokens" else 1) for row in mine)
            cells.append(f"{values[0]:.3g} … {statistics.median(values):.3g} … {values[-1]:.3g}")
        body.append([start, short(layer), *cells])
    return markdown_table(
        ["routers before", "layer", *(f"{label}: min … median … max" for label in names.values())], body
    )


def short(layer: str) -> str:
    """Return Enc-1 for encoder.block.1.layer.1.mlp, as the paper does."""
    side, _, block, *_ = layer.split(".")
    return f"{'Enc' if side == 'encoder' else 'Dec'}-{block}"


def draw(rows: Sequence[Row], start: str, choices: Sequence[Sequence[int]], path: Path) -> None:
    """Draw ROUGE-2 and loss against average bits, a line per method: the paper's Figure 2; a row for each choice."""
    figure = Figure(figsize=(11, 4.3 * len(choices) + 0.7), layout="constrained")
    original = next(row for row in rows if row["start"] == start and row["method"] == "original")
    labels = {"rouge2": "ROUGE-2", "loss": "loss (nats per target token)"}
    for pair, panels in zip(choices, figure.subplots(len(choices), 2, squeeze=False), strict=True):
        for axes, (name, label) in zip(panels, labels.items(), strict=True):
            for method, columns in mixed(rows, start, pair).items():
                points = [(average, [row[name] for row in same]) for average, same in sorted(columns.items())]
                error = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                x, y = [average for average, _ in points], [statistics.mean(values) for _, values in points]
                axes.errorbar(x, y, error if any(error) else None, label=method, capsize=2, **STYLES[method])
            axes.axhline(original[name], color="black", linewidth=0.8, linestyle=":", label="original")
            axes.set_xlabel(f"average bits per expert weight, choices {', '.join(map(str, pair))}")
            axes.set_ylabel(label)
            axes.grid(visible=True, alpha=0.3)
    figure.suptitle("Small Switch Transformer: function → description. HQQ, one group per row")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=80)

"""This part draws the largest variances of the experts' neurons: the paper's Figure 9."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from fractions import Fraction

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.replication.paper.common import THREE_LEVELS, Bench, Result, by_layer, markdown_table

UNUSUAL = 3.0
"""Times the layer's median, from which a MaxVar is marked."""


def figure9(bench: Bench) -> Result:
    """MaxVar of every expert, those that stand out marked."""
    entry = bench.entry("", Fraction(2), THREE_LEVELS, "router-norm-maxvar")
    plan = entry.plan
    assert plan is not None
    rows = []
    for layer in bench.layout.layers:
        scores = plan.scores[layer.prefix]
        median, moved = statistics.median(scores["max_var"]), plan.promoted.get(layer.prefix, [])
        for expert, value in enumerate(scores["max_var"]):
            rows.append(
                {
                    "layer": layer.index,
                    "expert": expert,
                    "max_var": value,
                    "times_median": value / median,
                    "router_norm": scores["router_norm"][expert],
                    "unusual": value > UNUSUAL * median,
                    "promoted": expert in moved,
                }
            )
    _draw_map(bench, rows)
    unusual, promoted = (sum(row[name] for row in rows) for name in ("unusual", "promoted"))
    lines = [
        f"Largest variance of a neuron's weights in the gate projection. Bold, red frame: above {UNUSUAL:g} × the "
        f"layer's median ({unusual} of {len(rows)}); ▲: moved up by the rule with ζ = 3 ({promoted} of {len(rows)}).",
        "",
        *markdown_table(["layer", "median", "MaxVar of experts 0, 1, …, in multiples of the median"], _map_lines(rows)),
    ]
    return Result("Figure 9: MaxVar of the experts", lines, rows, ["figure9.png"])


def _map_lines(rows: Sequence[dict]) -> Iterator[list[str]]:
    for layer, experts in by_layer(rows).items():
        cells = []
        for row in experts:
            text = f"{row['times_median']:.2f}{'▲' if row['promoted'] else ''}"
            cells.append(f"**{text}**" if row["unusual"] else text)
        yield [str(layer), f"{experts[0]['max_var'] / experts[0]['times_median']:.3e}", ", ".join(cells)]


def _draw_map(bench: Bench, rows: Sequence[dict]) -> None:
    layers = by_layer(rows)
    width = max(map(len, layers.values()))
    values = [[math.log10(row["max_var"]) if row["max_var"] else math.nan for row in of] for of in layers.values()]
    values = [line + [math.nan] * (width - len(line)) for line in values]
    figure = Figure(figsize=(3 + 0.55 * min(width, 40), 2 + 0.4 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    for line, experts in enumerate(layers.values()):
        for row in experts:
            at = row["expert"] - 0.46, line - 0.46
            if row["unusual"]:
                axes.add_patch(Rectangle(at, 0.92, 0.92, fill=False, edgecolor="red", linewidth=2))
            if row["promoted"]:
                axes.text(row["expert"], line, "▲", color="red", ha="center", va="center")
    axes.set_xticks(range(0, width, max(1, width // 32)))
    axes.set_yticks(range(len(layers)), list(map(str, layers)))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"red frame: above {UNUSUAL:g} × the layer's median; ▲: moved up", fontsize=9)
    figure.colorbar(image, label="log₁₀ of MaxVar")
    figure.savefig(bench.output / "figure9.png", dpi=130)

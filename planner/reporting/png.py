"""Draw the figures as PNG by matplotlib, for slides and papers, in the page's colours on white."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.common.units import size
from planner.output.files import atomic
from planner.reporting.facts import Facts
from planner.reporting.files import picture
from planner.reporting.palette import LIGHT, ink_on
from planner.reporting.scale import STEPS, Scale, number
from planner.reporting.value_maps import ValueMap, ValueMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
NUMBERED = 64
"""Maximum number of experts per layer, and of layers, for cells with numbers."""


def draw(facts: Facts, grids: ValueMaps, page: Path) -> list[Path]:
    """Write ``<page>-widths.png`` and, if a quantity is known, ``<page>-experts.png``; return their paths.

    Raises:
        CheckpointError: a full disk.
    """
    written = [_save(_widths(facts), picture(page, "widths"))]
    if grids.known:
        written.append(_save(_experts(facts, grids), picture(page, "experts")))
    return written


def _save(figure: Figure, path: Path) -> Path:
    with atomic(path) as temporary:
        # matplotlib's version is left out, so that the same checkpoint gives the same bytes.
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    return path


def _width(facts: Facts) -> float:
    """Return the width in inches of the map of widths."""
    return min(14.0, max(6.0, 0.45 * facts.most_experts + 1))


def _height(facts: Facts, cell: float) -> float:
    """Return the height in inches of all layers, for cells ``cell`` inches high."""
    return min(9.0, max(1.2, cell * len(facts.layers)))


def _widths(facts: Facts) -> Figure:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(_width(facts), _height(facts, 0.32) + 1.3), layout="constrained")
    axes = figure.subplots()
    bits = list(LIGHT.widths)
    colours = ListedColormap(list(LIGHT.widths.values()))
    values = _array(facts, [[float(width) for width in layer.widths] for layer in facts.layers])
    norm = BoundaryNorm([0, *(one + 0.5 for one in bits)], len(bits))
    axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    _axes(axes, facts)
    if facts.most_experts <= NUMBERED and len(facts.layers) <= NUMBERED:
        for row, layer in enumerate(facts.layers):
            for expert, width in enumerate(layer.widths):
                ink = ink_on(LIGHT.widths[width])
                axes.text(expert, row, str(width), ha="center", va="center", color=ink, fontsize=8)
    handles = [
        Patch(color=LIGHT.widths[width], label=f"{width} bit{'s' if width > 1 else ''}") for width in facts.widths
    ]
    for marked, marker, label in ((True, "^", "promoted by MaxVar"), (False, "s", "fallback")):
        if facts.num_promoted if marked else facts.num_fallbacks:
            handles.append(_mark(axes, facts, marked, marker, label))
    name = f"{facts.name}: " if facts.name else ""
    figure.suptitle(
        f"{name}{facts.average_bits:.3g} bits per expert weight, {size(facts.sizes.total)}",
        parse_math=False,
        fontsize=11,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _mark(axes: Axes, facts: Facts, promoted: bool, marker: str, label: str) -> Any:
    """Draw the marks of one kind in a corner of their cells; return their handle for the legend."""
    sign = -1 if promoted else 1
    places = [
        (expert + 0.36 * sign, row + 0.3 * sign)
        for row, layer in enumerate(facts.layers)
        for expert in sorted(layer.promoted if promoted else layer.fallbacks)
    ]
    x, y = zip(*places, strict=True)
    inches = min(_width(facts) / facts.most_experts, _height(facts, 0.32) / len(facts.layers))
    side = max(2.0, min(5.0, 0.25 * 72 * inches))
    edge = 0.4 if side > 3 else 0
    return axes.scatter(x, y, marker=marker, s=side**2, color="black", edgecolors="white", linewidths=edge, label=label)


def _experts(facts: Facts, grids: ValueMaps) -> Figure:
    from matplotlib.figure import Figure

    columns = 1 if facts.most_experts > NUMBERED else min(3, len(grids.known))
    rows = -(-len(grids.known) // columns)
    figure = Figure(figsize=(13.0, rows * (_height(facts, 0.16) + 1.2)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, grid in zip(panels, grids.known, strict=False):
        _quantity(axes, facts, grid)
    for axes in panels[len(grids.known) :]:
        axes.remove()
    return figure


def _quantity(axes: Axes, facts: Facts, grid: ValueMap) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    scale = Scale.of([value for row in grid.values for value in row if value is not None])
    # Steps and not values: between the largest and the smallest float, matplotlib's own sums overflow.
    steps = _array(facts, [[np.nan if value is None else scale.step(value) for value in row] for row in grid.values])
    colours = ListedColormap(list(LIGHT.steps))
    bounds, norm = scale.bounds(), BoundaryNorm(range(STEPS + 1), STEPS)
    drawn = axes.imshow(steps, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    _axes(axes, facts)
    unit = f", {grid.unit}" if grid.unit and grid.unit not in grid.title else ""
    axes.set_title(f"{grid.title}{unit}", fontsize=10)
    if len(bounds) > 1:
        ticks = [0, STEPS // 2, STEPS]
        bar = axes.figure.colorbar(drawn, ax=axes, ticks=ticks)
        bar.ax.set_yticklabels([number(bounds[tick]) for tick in ticks], fontsize=8)


def _array(facts: Facts, rows: list[list[float]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return an array [layers, experts]. Rows of layers with fewer experts end with NaN."""
    return np.array([row + [np.nan] * (facts.most_experts - len(row)) for row in rows])


def _axes(axes: Axes, facts: Facts) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("expert", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    step = -(-len(facts.layers) // 24)
    axes.set_yticks(range(0, len(facts.layers), step), [layer.label for layer in facts.layers][::step])

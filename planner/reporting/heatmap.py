"""Draw maps with one cell per expert as inline SVG. There is one path per colour, so 15 000 cells stay small.

Cells are drawn in units of cells, and text stands at percentages: in a narrow window a map gets narrower, and its text
keeps its size. What then has no room has the class of :data:`~planner.reporting.geometry.AMPLE`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape

from planner.reporting.facts import Facts, LayerFacts
from planner.reporting.geometry import Geometry
from planner.reporting.scale import STEPS, Scale, number, power_of_ten, superscript
from planner.reporting.value_maps import ValueMap

Cell = tuple[int, int]
"""(column, row)."""

NUMBER_FITS = (9, 12)
"""Minimum width and height in pixels of a cell with a digit."""

VALUE_FITS = (33, 15)
"""Minimum width and height in pixels of a cell with a number of :data:`LETTERS` characters."""

LETTERS = 5

LINE_FITS = 5
"""Minimum width in pixels of a cell with a line beside it."""


def width_map(facts: Facts, room: int) -> str:
    """Return the map of widths, at most ``room`` pixels wide, with numbers if they fit, promotions and fallbacks."""
    layers = facts.layers
    shape = Geometry.fit(facts.most_experts, [it.label for it in layers], room, (44, 30), 900, titled=True)
    cells: dict[int, list[Cell]] = defaultdict(list)
    for row, layer in enumerate(layers):
        for column, bits in enumerate(layer.widths):
            cells[bits].append((column, row))
    drawn = _paths((f"b{bits}", found) for bits, found in sorted(cells.items()))
    drawn += _lines(shape) + _marks(shape, layers, promoted=True) + _marks(shape, layers, promoted=False)
    texts = [(cell, f"b{bits}", str(bits)) for bits, found in sorted(cells.items()) for cell in found]
    numbers = _numbers(shape, texts, min(14, shape.height - 2, round(shape.width * 1.3)), NUMBER_FITS)
    return _map(shape, layers, drawn, numbers, "Bits per expert")


def value_map(facts: Facts, grid: ValueMap, room: int) -> str:
    """Return the map of one quantity, at most ``room`` pixels wide, and its legend."""
    layers = facts.layers
    shape = Geometry.fit(facts.most_experts, [it.label for it in layers], room, (44, 22), 600)
    scale = Scale.of([value for row in grid.values for value in row if value is not None])
    power = power_of_ten(scale.high)
    cells: dict[int, list[Cell]] = defaultdict(list)
    texts = []
    for y, row in enumerate(grid.values):
        for x, value in enumerate(row):
            if value is not None:
                step = scale.step(value)
                cells[step].append((x, y))
                texts.append(((x, y), f"s{step}", _short(value / 10.0**power)))
    drawn = _paths((f"s{step}", found) for step, found in sorted(cells.items())) + _lines(shape)
    short = all(len(text) <= LETTERS for _, _, text in texts)
    numbers = _numbers(shape, texts, 10, VALUE_FITS) if short else ""
    return _map(shape, layers, drawn, numbers, grid.title) + _legend(scale, grid.unit, power)


def _short(value: float) -> str:
    """Return a number for a cell: three significant digits, or fewer if they take more than :data:`LETTERS`."""
    unit, name = next((row for row in ((1e6, "M"), (1e3, "k")) if abs(value) >= max(row[0], 1e4)), (1.0, ""))
    texts = [f"{number(value / unit, digits)}{name}" for digits in (3, 2, 1)]
    return next((text for text in texts if len(text) <= LETTERS), texts[-1])


def _paths(classes: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """Return one path per class, in units of cells. Neighbours in a row form one rectangle."""
    return "".join(f'<path class="{name}" d="{_runs(cells)}"/>' for name, cells in classes)


def _lines(shape: Geometry) -> str:
    """Return lines between large cells; in narrow windows, lines between narrow cells would hide them."""
    if not shape.lined:
        return ""
    down = "".join(f"M{x} 0v{shape.rows}" for x in range(1, shape.columns))
    along = "".join(f"M0 {y}h{shape.columns}" for y in range(1, shape.rows))
    where = shape.where(LINE_FITS)
    upright = "" if where is None else f'<path class="lines {where}" d="{down}"/>'
    return f'{upright}<path class="lines" d="{along}"/>'


def _runs(cells: Sequence[Cell]) -> str:
    """Return rectangles ``M<x> <y>h<cells>v1H<x>z`` that cover the cells. The cells must come row by row."""
    runs: list[tuple[int, int, int]] = []
    for x, y in cells:
        if runs and runs[-1][1] == y and runs[-1][0] + runs[-1][2] == x:
            runs[-1] = (runs[-1][0], y, runs[-1][2] + 1)
        else:
            runs.append((x, y, 1))
    return "".join(f"M{x} {y}h{length}v1H{x}z" for x, y, length in runs)


def _numbers(shape: Geometry, texts: Iterable[tuple[Cell, str, str]], size: int, fits: tuple[int, int]) -> str:
    """Return the numbers in cells, for windows in which cells have at least the width and height of ``fits``."""
    where = shape.where(fits[0])
    if where is None or shape.height < fits[1]:
        return ""
    middle = shape.height / 2 + 0.36 * size
    drawn = "".join(
        f'<text class="{fill}-ink" x="{_percent(shape, x)}" y="{middle + y * shape.height:.4g}">{text}</text>'
        for (x, y), fill, text in texts
    )
    return f'<svg class="numbers {where}" height="{shape.down}" font-size="{size}">{drawn}</svg>'


def _percent(shape: Geometry, column: int) -> str:
    """Return the middle of a column as a part of the map's width."""
    return f"{100 * (column + 0.5) / shape.columns:.4g}%"


def _marks(shape: Geometry, layers: Sequence[LayerFacts], promoted: bool) -> str:
    """Return triangles in the upper left corner of promoted experts, or squares in the lower right of fallbacks."""
    side = max(3.0, min(8.0, 0.42 * min(shape.width, shape.height))) * (1.0 if promoted else 0.7)
    across, down = round(side / shape.width, 3), round(side / shape.height, 3)
    edge = 1 if shape.lined else 0
    right, below = edge / shape.width, edge / shape.height
    paths: dict[int, str] = defaultdict(str)
    for row, layer in enumerate(layers):
        for expert in sorted(layer.promoted if promoted else layer.fallbacks):
            if expert >= len(layer.widths):
                continue
            if promoted:
                path = f"M{expert + right:.6g} {row + below:.6g}h{across}l-{across} {down}z"
            else:
                path = f"M{expert + 1 - right:.6g} {row + 1 - below:.6g}h-{across}v-{down}h{across}z"
            paths[layer.widths[expert]] += path
    drawn = "".join(f'<path class="b{bits}-ink" d="{path}"/>' for bits, path in sorted(paths.items()))
    return f'<g class="{"promoted" if promoted else "fallback"}">{drawn}</g>'


def _map(shape: Geometry, layers: Sequence[LayerFacts], drawn: str, numbers: str, title: str) -> str:
    """Return the figure with its axes. The page's script finds a cell by its place in ``.cells``."""
    width, height = shape.across, shape.down
    along = "".join(
        f'<text class="{where}" text-anchor="middle" x="{_percent(shape, x)}" y="{shape.TOP - 5}">{x}</text>'
        for x, where in shape.column_ticks().items()
    )
    down = "".join(
        f'<text text-anchor="end" x="{shape.left - 6}" '
        f'y="{shape.TOP + (y + 0.5) * shape.height + 4:g}">{escape(layers[y].label)}</text>'
        for y in shape.row_ticks()
    )
    name = ""
    if shape.titled:
        middle = shape.TOP + height // 2
        down += f'<text text-anchor="middle" transform="translate(11 {middle}) rotate(-90)">layer</text>'
        text = '<text text-anchor="middle" x="50%" y="15">expert</text>'
        name = f'<svg class="axis" width="{width}" height="{shape.TITLE}">{text}</svg>'
    label = f"{title}: {shape.rows} layers from top to bottom, {shape.columns} experts from left to right"
    return (
        f'<div class="map" role="img" aria-label="{escape(label)}">'
        f'<svg class="axis" aria-hidden="true" width="{shape.left}" height="{shape.TOP + height}">{down}</svg>'
        f'<div class="plot" aria-hidden="true"><svg class="axis" width="{width}" height="{shape.TOP}">{along}</svg>'
        f'<div class="grid"><svg class="cells" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'viewBox="0 0 {shape.columns} {shape.rows}">{drawn}</svg>{numbers}</div>{name}</div></div>'
    )


def _legend(scale: Scale, unit: str, power: int) -> str:
    """Return the legend: the steps of a scale, with numbers at both ends and in the middle."""
    bounds, side = [bound / 10.0**power for bound in scale.bounds()], 30
    factor = f"×10{superscript(power)}" if power else ""
    more = ", ".join(part for part in (factor, escape(unit), "log" if scale.logarithmic else "") if part)
    if len(bounds) == 1:
        return f'<p class="legend">all {number(bounds[0])} {more}</p>'
    boxes = "".join(f'<path class="s{step}" d="M{step * side} 0h{side}v10h-{side}z"/>' for step in range(STEPS))
    shown = ((0, "start", bounds[0]), (STEPS // 2, "middle", bounds[STEPS // 2]), (STEPS, "end", bounds[-1]))
    texts = "".join(
        f'<text x="{at * side}" y="23" text-anchor="{anchor}">{number(value)}</text>' for at, anchor, value in shown
    )
    return (
        f'<svg class="scale axis" width="{STEPS * side}" height="26" role="img" '
        f'aria-label="scale from {number(bounds[0])} to {number(bounds[-1])} {more}">{boxes}{texts}</svg>'
        f'<span class="unit">{more}</span>'
    )

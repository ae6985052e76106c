"""Draw maps with one cell per expert as inline SVG. There is one path per colour, so 15 000 cells stay small."""

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

VALUE_FITS = (38, 15)
"""Minimum width and height in pixels of a cell with a number of :data:`LETTERS` characters."""

LETTERS = 5


def width_map(facts: Facts, room: int) -> str:
    """Return the map of widths, at most ``room`` pixels wide, with numbers if they fit, promotions and fallbacks."""
    layers = facts.layers
    shape = Geometry.fit(facts.most_experts, [it.label for it in layers], room, (44, 30), 900, titled=True)
    cells: dict[int, list[Cell]] = defaultdict(list)
    for row, layer in enumerate(layers):
        for column, bits in enumerate(layer.widths):
            cells[bits].append((column, row))
    parts = [_cells(shape, ((f"b{bits}", found) for bits, found in sorted(cells.items())))]
    if shape.width >= NUMBER_FITS[0] and shape.height >= NUMBER_FITS[1]:
        texts = ((cell, f"b{bits}", str(bits)) for bits, found in sorted(cells.items()) for cell in found)
        parts.append(_texts(shape, texts, min(14, shape.height - 2, round(shape.width * 1.3))))
    parts += [_marks(shape, layers, promoted=True), _marks(shape, layers, promoted=False)]
    return _svg(shape, layers, "".join(parts), "Bits per expert: experts from left to right, layers downwards")


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
    parts = [_cells(shape, ((f"s{step}", found) for step, found in sorted(cells.items())))]
    fits = shape.width >= VALUE_FITS[0] and shape.height >= VALUE_FITS[1]
    if fits and all(len(text) <= LETTERS for _, _, text in texts):
        parts.append(_texts(shape, texts, 10))
    drawn = _svg(shape, layers, "".join(parts), f"{grid.title}: experts from left to right, layers downwards")
    return drawn + _legend(scale, grid.unit, power)


def _short(value: float) -> str:
    """Return a number for a cell: three significant digits, or fewer if they take more than :data:`LETTERS`."""
    unit, name = next((row for row in ((1e6, "M"), (1e3, "k")) if abs(value) >= max(row[0], 1e4)), (1.0, ""))
    texts = [f"{number(value / unit, digits)}{name}" for digits in (3, 2, 1)]
    return next((text for text in texts if len(text) <= LETTERS), texts[-1])


def _cells(shape: Geometry, classes: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """Return one path per class, in units of cells. Neighbours in a row form one rectangle."""
    paths = "".join(f'<path class="{name}" d="{_runs(cells)}"/>' for name, cells in classes)
    place = f"translate({shape.left} {shape.TOP}) scale({shape.width} {shape.height})"
    lines = ""
    if shape.lined:
        down = "".join(f"M{x} 0v{shape.rows}" for x in range(1, shape.columns))
        along = "".join(f"M0 {y}h{shape.columns}" for y in range(1, shape.rows))
        lines = f'<path class="lines" d="{down}{along}"/>'
    return f'<g class="cells" transform="{place}">{paths}{lines}</g>'


def _runs(cells: Sequence[Cell]) -> str:
    """Return rectangles ``M<x> <y>h<cells>v1H<x>z`` that cover the cells. The cells must come row by row."""
    runs: list[tuple[int, int, int]] = []
    for x, y in cells:
        if runs and runs[-1][1] == y and runs[-1][0] + runs[-1][2] == x:
            runs[-1] = (runs[-1][0], y, runs[-1][2] + 1)
        else:
            runs.append((x, y, 1))
    return "".join(f"M{x} {y}h{length}v1H{x}z" for x, y, length in runs)


def _texts(shape: Geometry, texts: Iterable[tuple[Cell, str, str]], size: int) -> str:
    middle = shape.TOP + shape.height / 2 + 0.36 * size
    drawn = "".join(
        f'<text class="{fill}-ink" x="{shape.left + (x + 0.5) * shape.width:g}" '
        f'y="{middle + y * shape.height:.4g}">{text}</text>'
        for (x, y), fill, text in texts
    )
    return f'<g class="numbers" font-size="{size}">{drawn}</g>'


def _marks(shape: Geometry, layers: Sequence[LayerFacts], promoted: bool) -> str:
    """Return triangles in the upper left corner of promoted experts, or squares in the lower right of fallbacks."""
    side = round(max(3.0, min(8.0, 0.42 * min(shape.width, shape.height))), 1)
    edge = 1 if shape.lined else 0
    paths: dict[int, str] = defaultdict(str)
    for row, layer in enumerate(layers):
        for expert in sorted(layer.promoted if promoted else layer.fallbacks):
            if expert >= len(layer.widths):
                continue
            x, y = shape.left + expert * shape.width, shape.TOP + row * shape.height
            if promoted:
                paths[layer.widths[expert]] += f"M{x + edge} {y + edge}h{side}l-{side} {side}z"
            else:
                half = round(side * 0.7, 1)
                x, y = x + shape.width - edge, y + shape.height - edge
                paths[layer.widths[expert]] += f"M{x} {y}h-{half}v-{half}h{half}z"
    drawn = "".join(f'<path class="b{bits}-ink" d="{path}"/>' for bits, path in sorted(paths.items()))
    return f'<g class="{"promoted" if promoted else "fallback"}">{drawn}</g>'


def _svg(shape: Geometry, layers: Sequence[LayerFacts], inside: str, label: str) -> str:
    """Return the figure with its axes. The page's script finds cells by the ``data-`` attributes."""
    ticks = "".join(
        f'<text text-anchor="middle" x="{shape.left + (x + 0.5) * shape.width:g}" y="{shape.TOP - 5}">{x}</text>'
        for x in shape.column_ticks()
    )
    ticks += "".join(
        f'<text text-anchor="end" x="{shape.left - 6}" '
        f'y="{shape.TOP + (y + 0.5) * shape.height + 4:g}">{escape(layers[y].label)}</text>'
        for y in shape.row_ticks()
    )
    width, height = shape.right + 1, shape.bottom + 1
    if shape.titled:
        middle, along = (shape.left + shape.right) // 2, (shape.TOP + shape.bottom) // 2
        ticks += f'<text text-anchor="middle" x="{middle}" y="{shape.bottom + 15}">expert</text>'
        ticks += f'<text text-anchor="middle" transform="translate(11 {along}) rotate(-90)">layer</text>'
        height += shape.TITLE
    return (
        f'<div class="scroll"><svg class="map" role="img" aria-label="{escape(label)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" data-left="{shape.left}" data-top="{shape.TOP}" '
        f'data-width="{shape.width}" data-height="{shape.height}"><g class="axis">{ticks}</g>{inside}</svg></div>'
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

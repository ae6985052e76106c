"""Draw the size breakdown as bars: before, and after on the same scale."""

from __future__ import annotations

from planner.common.units import size
from planner.reporting.facts import Facts, Part
from planner.reporting.geometry import AMPLE, AMPLE_ROOM, NARROW_ROOM

WIDTH = 1096
HEIGHT = 34
LABEL_FITS = 44
"""Minimum width in pixels of a segment that shows its percentage."""


def part_class(parts: tuple[Part, ...], index: int) -> str:
    """Return the CSS class of a part's colour. Expert codes have one class per width; other parts are numbered."""
    part = parts[index]
    if part.bits is not None:
        return f"b{part.bits}"
    return f"p{sum(earlier.bits is None for earlier in parts[:index])}"


def size_bar(facts: Facts) -> str:
    """Return both bars as inline SVG, as wide as the page: lengths are percentages, text keeps its size."""
    sizes = facts.sizes
    unit = 100 / max(sizes.before, sizes.total)
    before = f"source, {size(sizes.before)}" if sizes.source else f"the same tensors in 16 bits, {size(sizes.before)}"
    after = f"this checkpoint, {size(sizes.total)}"
    drawn = [f'<text class="name" x="0" y="12">{before}</text>']
    drawn.append(f'<rect class="whole" x="0" y="20.5" width="{sizes.before * unit:.4g}%" height="{HEIGHT - 1}"/>')
    top, x = 20 + HEIGHT + 34, 0.0
    drawn.append(f'<text class="name" x="0" y="{top - 8}">{after}</text>')
    for index, part in enumerate(sizes.parts):
        width, fill = part.bytes * unit, part_class(sizes.parts, index)
        drawn.append(f'<rect class="part {fill}" x="{x:.4g}%" y="{top}" width="{width:.4g}%" height="{HEIGHT}"/>')
        if width * AMPLE_ROOM / 100 >= LABEL_FITS:
            where = "" if width * NARROW_ROOM / 100 >= LABEL_FITS else AMPLE
            y, share = top + HEIGHT / 2 + 4, f"{part.bytes / sizes.total:.0%}"
            drawn.append(f'<text class="{fill}-ink {where}" x="{x:.4g}%" dx="8" y="{y:.0f}">{share}</text>')
        x += width
    label = f"Bars to scale: {before}; {after}, by the parts of the table below"
    return (
        f'<svg class="bar" role="img" aria-label="{label}" width="{WIDTH}" height="{top + HEIGHT + 2}">'
        f"{''.join(drawn)}</svg>"
    )

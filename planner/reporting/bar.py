"""Draw the size breakdown as bars: before, and after on the same scale."""

from __future__ import annotations

from planner.common.units import size
from planner.reporting.facts import Facts, Part

WIDTH = 1096
HEIGHT = 34
LABEL_FITS = 58
"""Minimum width in pixels of a segment that shows its percentage."""


def part_class(parts: tuple[Part, ...], index: int) -> str:
    """Return the CSS class of a part's colour. Expert codes have one class per width; other parts are numbered."""
    part = parts[index]
    if part.bits is not None:
        return f"b{part.bits}"
    return f"p{sum(earlier.bits is None for earlier in parts[:index])}"


def size_bar(facts: Facts) -> str:
    """Return both bars as inline SVG."""
    sizes = facts.sizes
    unit = WIDTH / max(sizes.before, sizes.total)
    before = f"source, {size(sizes.before)}" if sizes.source else f"the same tensors in 16 bits, {size(sizes.before)}"
    drawn = [f'<text class="name" x="0" y="12">{before}</text>']
    drawn.append(f'<rect class="whole" x="0.5" y="20.5" width="{sizes.before * unit - 1:.1f}" height="{HEIGHT - 1}"/>')
    top, x = 20 + HEIGHT + 34, 0.0
    drawn.append(f'<text class="name" x="0" y="{top - 8}">this checkpoint, {size(sizes.total)}</text>')
    for index, part in enumerate(sizes.parts):
        width, fill = part.bytes * unit, part_class(sizes.parts, index)
        drawn.append(
            f'<rect class="{fill}" x="{x:.2f}" y="{top}" width="{max(0.0, width - 1):.2f}" height="{HEIGHT}">'
            f"<title>{part.title}: {size(part.bytes)}</title></rect>"
        )
        if width >= LABEL_FITS:
            share = f"{part.bytes / sizes.total:.0%}"
            drawn.append(f'<text class="{fill}-ink" x="{x + 8:.2f}" y="{top + HEIGHT / 2 + 4:.0f}">{share}</text>')
        x += width
    height = top + HEIGHT + 2
    return (
        f'<svg class="bar" role="img" aria-label="Sizes before and after" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}">{"".join(drawn)}</svg>'
    )

"""The colours of the figures, for page and PNG: fills, and an ink that is readable on each fill.

Widths go from vermilion (few bits) to deep blue (many bits). People with the common kinds of colour blindness can tell
these hues apart. Other quantities use one hue; larger values differ more from the page's colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BLACK, WHITE = "#000000", "#ffffff"


@dataclass(frozen=True)
class ColourScheme:
    """Colours on one background.

    Attributes:
        names: CSS variable → colour of the page itself.
        widths: bits → fill.
        steps: fills for low to high values.
        parts: fills of the parts besides expert codes, in the order of the size breakdown.
    """

    names: Mapping[str, str]
    widths: Mapping[int, str]
    steps: tuple[str, ...]
    parts: tuple[str, ...]


LIGHT = ColourScheme(
    names={"page": "#ffffff", "ink": "#1b1f24", "muted": "#59636e", "rule": "#d9dee4", "panel": "#f5f7f9"},
    widths={1: "#c4501b", 2: "#f2b04e", 3: "#a3d3ee", 4: "#3f8cc0", 8: "#3b2f7a"},
    steps=("#e6f1ed", "#c6e2d9", "#9dcdbf", "#6fb3a2", "#459584", "#277465", "#0f4f45"),
    parts=("#8d7fb0", "#c3bcd6", "#c9ced4"),
)
DARK = ColourScheme(
    names={"page": "#14171b", "ink": "#e6e9ed", "muted": "#9aa4af", "rule": "#343b44", "panel": "#1c2127"},
    widths={1: "#cf5722", 2: "#f0b354", 3: "#9ccbe6", 4: "#3f8cc0", 8: "#5f4fc4"},
    steps=("#1b322d", "#1f463d", "#245e52", "#317a6a", "#4c9a87", "#7fbfad", "#bfe5d9"),
    parts=("#8f80b5", "#665d85", "#4a525c"),
)


def luminance(colour: str) -> float:
    """Return WCAG's relative luminance of ``#rrggbb``, 0 to 1."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio of two colours, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(fill: str) -> str:
    """Return black or white, whichever has more contrast; the contrast is at least 4.58."""
    return max((BLACK, WHITE), key=lambda ink: contrast(ink, fill))


def css_variables(scheme: ColourScheme) -> str:
    """Return the declarations of a scheme: ``--b3`` and ``--s0`` are fills, ``--b3-ink`` is read on one of them."""
    fills = {f"b{bits}": colour for bits, colour in scheme.widths.items()}
    fills |= {f"s{step}": colour for step, colour in enumerate(scheme.steps)}
    fills |= {f"p{part}": colour for part, colour in enumerate(scheme.parts)}
    inks = {f"{name}-ink": ink_on(colour) for name, colour in fills.items()}
    return "".join(f"--{name}:{colour};" for name, colour in {**scheme.names, **fills, **inks}.items())


def css_classes() -> str:
    """Return the CSS rules for the variables: ``.b3`` is filled, ``.b3-ink`` is text or a mark on it."""
    names = [f"b{bits}" for bits in LIGHT.widths]
    names += [f"s{step}" for step in range(len(LIGHT.steps))] + [f"p{part}" for part in range(len(LIGHT.parts))]
    return "".join(f".{name}{{fill:var(--{name})}}.{name}-ink{{fill:var(--{name}-ink)}}" for name in names)

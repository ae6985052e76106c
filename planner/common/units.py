"""Text for people: sizes and layer numbers."""

from __future__ import annotations

GIB = 1 << 30


def size(count: float) -> str:
    """Return a number of bytes as text, in the largest unit that it reaches."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def layer_number(prefix: str) -> str:
    """Return the layer's number in a prefix, or the prefix if it has none."""
    return next((part for part in prefix.split(".") if part.isdigit()), prefix)

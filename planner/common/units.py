"""Numbers and names as people read them."""

from __future__ import annotations

GIB = 1 << 30


def size(count: float) -> str:
    """Return bytes in the unit that keeps three digits readable."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def layer_number(prefix: str) -> str:
    """Return the number of the layer that a prefix stands for, or the prefix."""
    return next((part for part in prefix.split(".") if part.isdigit()), prefix)

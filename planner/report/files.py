"""The files of a checkpoint that are there for people, and which files belong to a checkpoint at all."""

from __future__ import annotations

from pathlib import Path

PAGE = "report.html"
CARD = "README.md"
PICTURES = ("widths", "experts")


def picture(page: Path, name: str) -> Path:
    """Return where a picture of a page goes: beside it, ``<page>-<name>.png``."""
    return page.with_name(f"{page.stem}-{name}.png")

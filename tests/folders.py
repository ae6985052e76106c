"""Output folders, compared."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}

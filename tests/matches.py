"""Searching files for what they must contain."""

from __future__ import annotations

import re
from pathlib import Path


def first_match(pattern: str, path: Path) -> re.Match[str]:
    """Return the first match of a pattern in a file, which must have one."""
    found = re.search(pattern, path.read_text(), re.M)
    assert found is not None, f"{path}: {pattern}"
    return found

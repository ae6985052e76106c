"""Check the paths that a user names for a command's output, before any work."""

from __future__ import annotations

import os
from pathlib import Path

from planner.output.files import reason, refuse_special
from vllm_moeq.format import UsageError


def check_output(output: Path) -> None:
    """Check that an output, which must be new, can be created.

    Raises:
        UsageError: it exists already, or its parent is missing or cannot be written.
    """
    if os.path.lexists(output):
        raise UsageError(f"{output}: the output exists already; choose another or delete it")
    _check_parent(output)


def check_file(path: Path, *, links: bool = False) -> None:
    """Check that a file can be written whose older version is replaced.

    Args:
        path: the file.
        links: whether a link to a file may be replaced; in the Hub's cache all files are links.

    Raises:
        UsageError: it is a link, a folder, a pipe or a device, or its folder is missing or cannot be written.
    """
    try:
        refuse_special(path, links=links)
    except OSError as error:
        raise UsageError(f"{path}: cannot write ({reason(error)})") from None
    _check_parent(path)


def _check_parent(output: Path) -> None:
    parent = output.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{output}: expected the parent folder {parent} to exist")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{output}: the folder {parent} cannot be written")

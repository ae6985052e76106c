"""Ctrl-C and SIGTERM end a command with one line that says what it keeps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from planner.common.units import size

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit status after Ctrl-C and after SIGTERM."""


class Terminated(KeyboardInterrupt):
    """SIGTERM. What cleans up after Ctrl-C cleans up after it, too."""


def note_kept(path: Path) -> None:
    """Note on the error that is being handled, if any, that ``path`` is kept for a later run, if it exists.

    Earlier notes on files within it are dropped: a folder that was kept goes or stays with the one around it.
    """
    error = sys.exception()
    if error is None:
        return
    error.__notes__ = [note for note in getattr(error, "__notes__", []) if not note.startswith(f"{path}{os.sep}")]
    if not path.exists():
        return
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    error.add_note(f"{path} ({size(sum(file.stat().st_size for file in files))})")


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Terminated` at SIGTERM. After an interruption, print what is kept and exit with status 130 or 143.

    Raises:
        SystemExit: the block was interrupted.
    """
    main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    before = signal.signal(signal.SIGTERM, _terminate) if main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        interruption = _interruption(error)
        if interruption is None:
            raise
        terminated = isinstance(interruption, Terminated)
        kept = getattr(interruption, "__notes__", [])
        line = f"{'terminated' if terminated else 'interrupted'}; {_consequence(kept)}"
        Console(stderr=True, highlight=False).print(line, soft_wrap=True, markup=False, emoji=False)
        raise SystemExit(TERMINATED if terminated else INTERRUPTED) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the cleaning up short
    raise Terminated


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the interruption behind an error: typer turns it into an exit with status 130."""
    while isinstance(error, SystemExit) and error.code == INTERRUPTED:
        error = error.__context__
        error = error.__cause__ if error is not None and error.__cause__ is not None else error
    return error if isinstance(error, KeyboardInterrupt) else None


def _consequence(kept: list[str]) -> str:
    if not kept:
        return "nothing is kept"
    command = "the same command without --no-resume" if "--no-resume" in sys.argv else "the same command"
    these = "it" if len(kept) == 1 else "them"
    return f"kept: {' and '.join(kept)}; {command} continues from {these}; deleting {these} is safe"

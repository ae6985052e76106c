"""Progress on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows the progress of a command; ``quiet`` shows nothing.

    Standard output stays free for results, so that ``--json`` can be piped.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and show count, elapsed and remaining time.

        Args:
            items: a sequence, or any iterable if ``total`` is given.
            what: name of the work.
            total: number of items; without a terminal, the caller then prints its own lines.
        """
        if self.quiet or not self.console.is_terminal:
            yield from items if total is not None else self._lines(items, what)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console, transient=True) as bar:
            yield from bar.track(items, total=total, description=what)

    def _lines(self, items: Iterable[T], what: str) -> Iterator[T]:
        sequence = list(items)
        began = last = time.monotonic()
        for done, item in enumerate(sequence, start=1):
            yield item
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES and done < len(sequence):
                remaining = (now - began) / done * (len(sequence) - done)
                self.line(f"{what}: {done}/{len(sequence)}, {now - began:.0f} s, about {remaining:.0f} s left")
                last = now


def duration(seconds: float) -> str:
    """Return a time as text for people: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

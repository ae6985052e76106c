"""Progress of a whole run: a live display on a terminal, plain lines elsewhere, events for a program's own display."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from planner.common.schedule import Part, Schedule
from planner.common.shown import shown

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Event:
    """One line about a run, for a program with a display of its own. Its ``str`` is the line, so ``print`` shows it.

    Attributes:
        text: a note, or how far the run is.
        done: the share of the whole run that is done, from 0 to 1; None before and after it.
    """

    text: str
    done: float | None = None

    def __str__(self) -> str:
        """Return the line."""
        return self.text


class Progress:
    """Shows the progress of a run on stderr; ``quiet`` shows nothing.

    Standard output stays free for results, so that ``--json`` can be piped.

    Args:
        quiet: show nothing.
        listener: gets every line as an :class:`Event`, and stderr gets none.
    """

    def __init__(self, quiet: bool = False, listener: Callable[[Event], object] | None = None) -> None:
        self.console = Console(stderr=True, quiet=quiet or listener is not None, highlight=False)
        self._listener = listener
        self._schedule: Schedule | None = None
        self._display: _Display | None = None
        self._said = time.monotonic()

    def line(self, text: str) -> None:
        """Print one line, or tell it to the listener."""
        if self._listener is not None:
            self._listener(Event(shown(text), None if self._schedule is None else self._schedule.fraction))
        self.console.print(shown(text), soft_wrap=True, markup=False, emoji=False)
        self._said = time.monotonic()

    @contextmanager
    def whole(self, parts: Sequence[Part] = ()) -> Iterator[None]:
        """Show everything that the block tracks as one run; :meth:`expect` may tell its parts later."""
        self._said = time.monotonic()
        self._schedule = Schedule((), self._said)
        try:
            if self.console.is_terminal and not self.console.quiet:
                self._display = _Display(self.console, self._schedule)
            self.expect(parts)
            yield
        finally:
            if self._display is not None:
                self._display.stop()
            self._schedule = self._display = None

    def expect(self, parts: Sequence[Part]) -> None:
        """Tell the parts of the whole run. Without a terminal, a run that takes longer than a line is announced."""
        if self._schedule is None:
            raise RuntimeError("expected a whole run")
        self._schedule = Schedule(parts, self._schedule.began)
        if self._display is not None:
            self._display.show(self._schedule)
        elif (expected := self._schedule.expected or 0.0) >= SECONDS_BETWEEN_LINES:
            names = dict.fromkeys(name for name, _ in parts)
            self.line(f"{', '.join(names)}: about {duration(expected)} in all")

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and show how far they and the whole run are.

        Args:
            items: a sequence, or any iterable if ``total`` is given, whose items arrive when their work is done.
            what: name of the work, as in the parts of the run.
            total: number of items.
        """
        if self._schedule is None:
            with self.whole([(what, None)]):
                yield from self.track(items, what, total)
            return
        arrive_done = total is not None
        if total is None:
            items = list(items)
            total = len(items)
        schedule = self._schedule
        schedule.enter(what, total, time.monotonic())
        self._show(schedule)
        for number, item in enumerate(items, start=1):
            schedule.start(number)
            if arrive_done:
                schedule.finish(number, time.monotonic())
            yield item
            schedule.finish(number, time.monotonic())
            self._show(schedule)

    def where(self) -> str:
        """Return how far the work is, and what is left of the whole run, for the end of a line."""
        return "" if self._schedule is None else _where(self._schedule)

    def _show(self, schedule: Schedule) -> None:
        if self._display is not None:
            self._display.show(schedule)
        elif 0 < schedule.done < schedule.total and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self.line(_where(schedule))


class _Display:
    """Two live rows: the whole run, and the work that is being done."""

    def __init__(self, console: Console, schedule: Schedule) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), _Figures(), TimeElapsedColumn())
        self._rows = RichProgress(*columns, console=console, transient=True)
        self._run = self._rows.add_task("whole run", total=1.0, schedule=schedule)
        self._work = self._rows.add_task("starting", total=None, schedule=None)
        self._name = ""
        self._rows.start()

    def show(self, schedule: Schedule) -> None:
        if schedule.name != self._name:
            self._name = schedule.name
            self._rows.reset(self._work, description=schedule.name)
        self._rows.update(self._run, completed=schedule.fraction, schedule=schedule)
        if schedule.total:
            self._rows.update(self._work, completed=schedule.done, total=schedule.total)

    def stop(self) -> None:
        self._rows.stop()


class _Figures(ProgressColumn):
    """Percentage and remaining time of the run, which go on between two items; number of items of the work."""

    def render(self, task: Task) -> Text:
        schedule = task.fields["schedule"]
        if isinstance(schedule, Schedule):
            return Text(f"{100 * schedule.fraction:.0f}%{_left(schedule)}")
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


def _where(schedule: Schedule) -> str:
    elapsed = duration(time.monotonic() - schedule.began)
    return f"{schedule.name} {schedule.item}/{schedule.total}, {elapsed}{_left(schedule)}"


def _left(schedule: Schedule) -> str:
    left = schedule.remaining(time.monotonic())
    return "" if left is None else f", about {duration(left)} left"


def duration(seconds: float) -> str:
    """Return a time as text for people: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

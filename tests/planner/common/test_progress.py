"""What a command shows of its progress: lines in a file, a live display on a terminal."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from planner.common.progress import Event, Progress


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("planner.common.progress.time", made)
    return made


Shown = Callable[[], list[str]]


@pytest.fixture
def shown() -> tuple[Progress, Shown]:
    """A progress without a terminal, and what it has printed so far."""
    progress, file = Progress(), io.StringIO()
    progress.console = Console(file=file, highlight=False)
    return progress, lambda: file.getvalue().splitlines()


def test_the_first_line_comes_before_any_work(shown: tuple[Progress, Shown]) -> None:
    progress, lines = shown
    with progress.whole([("reading", 60.0), ("measuring", 200.0), ("measuring", 100.0)]):
        assert lines() == ["reading, measuring: about 6 min in all"]


def test_a_short_run_says_nothing_but_its_results(shown: tuple[Progress, Shown]) -> None:
    progress, lines = shown
    with progress.whole([("reading", 2.0)]):
        assert list(progress.track([1, 2, 3], "reading")) == [1, 2, 3]
    assert lines() == []


def test_lines_come_every_ten_seconds_and_count_the_whole_run(shown: tuple[Progress, Shown], clock: Clock) -> None:
    progress, lines = shown

    def written() -> Iterator[int]:
        for item in range(3):
            clock.now += 20
            yield item

    with progress.whole([("reading", 40.0), ("writing", 60.0)]):
        for _ in progress.track(list(range(10)), "reading"):
            clock.now += 4
        for item in progress.track(written(), "writing", 3):
            progress.line(f"layer {item}; {progress.where()}")
    assert lines() == [
        "reading, writing: about 2 min in all",
        "reading 3/10, 12 s, about 88 s left",
        "reading 6/10, 24 s, about 76 s left",
        "reading 9/10, 36 s, about 64 s left",
        "layer 0; writing 1/3, 60 s, about 40 s left",
        "layer 1; writing 2/3, 80 s, about 20 s left",
        "layer 2; writing 3/3, 2 min, about 0 s left",
    ]


def test_work_without_a_plan_has_its_own_progress(shown: tuple[Progress, Shown], clock: Clock) -> None:
    progress, lines = shown
    for _ in progress.track(["a", "b", "c"], "exporting"):
        clock.now += 10
    assert lines() == ["exporting 1/3, 10 s, about 20 s left", "exporting 2/3, 20 s, about 10 s left"]


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = Progress(quiet=True)
    with progress.whole([("reading", 100.0)]):
        for _ in progress.track([1, 2], "reading"):
            clock.now += 50
    assert capsys.readouterr() == ("", "")


def test_a_listener_gets_every_line_and_stderr_none(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    heard: list[Event] = []
    progress = Progress(listener=heard.append)
    progress.line("note: said\nbefore")
    with progress.whole([("reading", 20.0), ("writing", 20.0)]):
        for _ in progress.track([1, 2], "reading"):
            clock.now += 10
    lines = ["note: said before", "reading, writing: about 40 s in all", "reading 1/2, 10 s, about 30 s left"]
    assert [str(event) for event in heard] == lines
    assert [event.done for event in heard] == [None, 0.0, 0.25]
    assert capsys.readouterr() == ("", "")


class TestOnATerminal:
    @pytest.fixture
    def screen(self) -> tuple[Progress, io.StringIO]:
        progress, file = Progress(), io.StringIO()
        progress.console = Console(file=file, force_terminal=True, width=100, highlight=False)
        return progress, file

    def test_one_display_has_the_whole_run_and_the_work(self, screen: tuple[Progress, io.StringIO]) -> None:
        progress, file = screen
        with progress.whole([("reading", 50.0), ("writing", 50.0)]):
            for _ in progress.track([1, 2], "reading"):
                pass
            for number in progress.track([1, 2], "writing"):
                if number == 2:
                    time.sleep(0.3)  # it is drawn ten times a second
                    progress.line("layer 1 is written")
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
        rows = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
        assert any(re.match(r"whole run.* 75%, about \d+ s left 0:00:0\d", row) for row in rows), rows
        assert any(re.match(r"writing +━.* 1/2 +0:00:0\d", row) for row in rows), rows
        assert "layer 1 is written" in [row.rstrip() for row in rows]

    def test_the_cursor_is_shown_again_after_an_error(self, screen: tuple[Progress, io.StringIO]) -> None:
        progress, file = screen
        with pytest.raises(KeyboardInterrupt), progress.whole([("reading", 50.0)]):
            raise KeyboardInterrupt
        assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")

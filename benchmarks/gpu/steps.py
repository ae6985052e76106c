"""A step of the suite: a command with a time limit, whose output lands in a log however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

GRACE = ((signal.SIGINT, 15.0), (signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0))
"""The signals that end a step, and the seconds that it has after each: pytest prints what it found at the first one."""

OUT_OF_TIME = 124
"""Exit status of a step that was ended for time, as of ``timeout``."""


class Interrupted(BaseException):
    """Somebody wants the suite to end; no step's failure is this.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass(frozen=True)
class Ended:
    """How a step ended.

    Attributes:
        name: the step.
        result: the cell of the summary.
        seconds: how long it took.
        passed: whether the suite may still pass.
    """

    name: str
    result: str
    seconds: int = 0
    passed: bool = True


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Interrupted` at Ctrl-C and SIGTERM, also where the shell had them ignored; once, then never again.

    Children start with the usual handlers, since handled signals do not pass on. After an interruption signals stay
    ignored: whoever started the suite may send a second one, which must not change how it ends.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # what is packed now is all that there will be
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, interrupt)
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is interrupt:
            signal.signal(number, handler)


def run_step(name: str, command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> Ended:
    """Run a command in a session of its own and end it, with all that it started, after ``limit`` seconds.

    Args:
        name: the step.
        command: its command.
        log: the file that gets its output.
        limit: seconds.
        environment: its variables.

    Returns:
        How it ended; a log that cannot be opened is a failure too.
    """
    began = time.monotonic()
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = OUT_OF_TIME
            finally:
                end(process)
    except OSError as error:
        return Ended(name, f"failed: {error.strerror}", round(time.monotonic() - began), passed=False)
    results = {0: "passed", OUT_OF_TIME: f"stopped after {limit:.0f} s"}
    result = results.get(status, f"failed, status {status}" if status >= 0 else f"failed, signal {-status}")
    return Ended(name, result, round(time.monotonic() - began), passed=status == 0)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step's processes, the ones that outlive its first one too."""
    for number, patience in GRACE:
        if process.poll() is not None:
            break
        _send(process, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    _send(process, signal.SIGKILL)


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return

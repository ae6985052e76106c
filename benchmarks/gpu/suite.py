"""What only a GPU can show, on one GPU: its kernels' answers, then a layer against its rivals, then a real server.

Started by benchmarks/gpu_suite.sh, which says what it reads and writes. What must be right comes first. A step that
fails or runs out of time is recorded and the next one starts, except that nothing can follow a failed environment.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.archive import Scrubber, names_here, pack
from benchmarks.gpu.environment import FILE
from benchmarks.gpu.steps import Ended, Interrupted, interruptible, run_step

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "benchmarks/models/stdlib-mixtral"
SECONDS = 540
"""Seconds of everything, unless SUITE_SECONDS says otherwise; the limits of steps are meant for it and grow with it."""

LEAST = 10
"""Seconds without which no step starts."""

SPACE = 1 << 30
"""Bytes that must be free for checkpoints of the shipped model, caches and logs."""

PROCESSES = 8
"""Processes of tests: most of their time goes into compiling, and each holds some of the card's memory."""

SAVE = 40.0
"""Seconds that the layer benchmark keeps to end by itself."""


class SkippedError(Exception):
    """A step has nothing to do here; the message says why."""


@dataclass
class Suite:
    """One run.

    Attributes:
        results: folder of results.
        python: the steps' interpreter.
        total: seconds of everything.
        variables: the environment.
        found: what the first step wrote.
    """

    results: Path
    python: str
    total: float
    variables: Mapping[str, str]
    found: dict[str, Any] = field(default_factory=dict)

    def module(self, name: str, *arguments: object) -> list[str]:
        """Return the command of a module."""
        return [self.python, "-m", name, *map(str, arguments)]


@dataclass(frozen=True)
class Step:
    """One row of the suite.

    Attributes:
        name: its name, of its log too.
        seconds: the limit of a suite of :data:`SECONDS`.
        command: makes the command from the run and the seconds; raises SkippedError.
    """

    name: str
    seconds: int
    command: Callable[[Suite, float], list[str]]


def environment(suite: Suite, _: float) -> list[str]:
    """Return the command that describes the card and the packages."""
    return suite.module("benchmarks.gpu.environment", suite.results)


def tests(suite: Suite, _: float) -> list[str]:
    """Return the command that compares the kernels with float64 on the card, each result as soon as it is known."""
    if "pytest" not in suite.found["packages"]:
        raise SkippedError("pytest is not installed")
    together = ["-n", "logical", "--maxprocesses", PROCESSES] if "xdist" in suite.found["packages"] else []
    marked = ["-m", "gpu and not full", "-v", "--tb=short", "-p", "no:cacheprovider"]
    return suite.module("pytest", "tests/kernels", *marked, *together)


def layer(suite: Suite, limit: float) -> list[str]:
    """Return the command that times a layer and its rivals."""
    return _layer(suite, "layer", limit, suite.variables.get("PEERS", "").split())


def layer_again(suite: Suite, limit: float) -> list[str]:
    """Return the same command for the peers that are left after one of them broke the device."""
    retry = suite.results / "layer" / "retry.txt"
    if not retry.is_file():
        raise SkippedError("no kernel broke the device")
    return _layer(suite, "layer-again", limit, retry.read_text().split())


def _layer(suite: Suite, output: str, limit: float, peers: list[str]) -> list[str]:
    budget = ["--budget-seconds", max(limit - SAVE, limit / 2), "--seconds-per-point", 0.5, "--probe-seconds", 45]
    chosen = ["--peers", *peers] if peers else []
    return suite.module("benchmarks.kernels.moe_layer", "--output", suite.results / output, *budget, *chosen)


def serving(suite: Suite, _: float) -> list[str]:
    """Return the command that compares servers, and our tokens with a dense checkpoint's."""
    if suite.found["serving"]:
        raise SkippedError(suite.found["serving"])
    asked = suite.variables.get
    made = ["--quantized", asked("QUANTIZED")] if asked("QUANTIZED") else []
    return suite.module(
        "benchmarks.serving.throughput", "--source", asked("MODEL") or SHIPPED, *made,
        "--text", asked("TEXT") or SHIPPED / "held_out.txt", "--output", suite.results / "serving", "--check-dense",
    )  # fmt: skip


def figure3(suite: Suite, _: float) -> list[str]:
    """Return the command that times allocations, where somebody has the statistics."""
    places = [Path(suite.variables.get("STATISTICS", "")), ROOT / ".gpu/mixtral-8x7b-statistics.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise SkippedError("no STATISTICS")
    output = suite.results / "figure3"
    return suite.module(
        "benchmarks.kernels.figure3", "--statistics", found, "--output", output, "--seconds-per-point", 0.3
    )


STEPS = (
    Step("environment", 60, environment),
    Step("tests", 150, tests),
    Step("layer", 150, layer),
    Step("layer-again", 100, layer_again),
    Step("serving", 240, serving),
    Step("figure3", 45, figure3),
)
"""What must be right comes before what is timed."""


def run(suite: Suite, note: Callable[[Ended], None]) -> None:
    """Run every step, one after the other, within the time.

    Args:
        suite: the run.
        note: is told how each step ended.

    Raises:
        Interrupted: somebody wants it to end.
    """
    began = time.monotonic()
    for step in STEPS:
        left = suite.total - (time.monotonic() - began)
        limit = min(step.seconds * suite.total / SECONDS, left)
        try:
            command = step.command(suite, limit)
        except SkippedError as reason:
            note(Ended(step.name, f"skipped: {reason}"))
            continue
        if limit < LEAST:
            note(Ended(step.name, "no time left", passed=False))
            continue
        print(f"== {step.name}, at most {limit:.0f} s", flush=True)
        try:
            ended = run_step(step.name, command, suite.results / f"{step.name}.log", limit, suite.variables)
        except Interrupted:
            note(Ended(step.name, "interrupted", passed=False))
            raise
        _show_end(suite.results / f"{step.name}.log")
        note(ended)
        if step.command is environment:
            if not ended.passed:
                return
            suite.found = json.loads((suite.results / FILE).read_text())


def _show_end(log: Path, lines: int = 40) -> None:
    """Print the last lines of a step's output."""
    if log.is_file():
        text = log.read_text(encoding="utf-8", errors="replace")
        print("\n".join(text.splitlines()[-lines:]), flush=True)


class Summary:
    """suite.md, which is whole after every step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Ended] = []

    def __call__(self, ended: Ended) -> None:
        """Add a step; a file that cannot be written does not stop the next step."""
        self.rows.append(ended)
        try:
            self.path.write_text(self.text())
        except OSError as error:
            print(f"{self.path}: {error.strerror}", file=sys.stderr)
            self.rows[-1] = Ended(ended.name, ended.result, ended.seconds, passed=False)

    def text(self) -> str:
        """Return the table."""
        lines = ["| step | result | seconds |", "| --- | --- | ---: |"]
        return "\n".join([*lines, *(f"| {row.name} | {row.result} | {row.seconds} |" for row in self.rows)]) + "\n"


def refusal(arguments: list[str], variables: Mapping[str, str]) -> str:
    """Return what is wrong with the request, or an empty string."""
    total = variables.get("SUITE_SECONDS", str(SECONDS))
    if len(arguments) != 1:
        return f"expected one folder for results, found {len(arguments)}"
    if not total.isdecimal() or int(total) < 6 * LEAST:
        return f"SUITE_SECONDS: expected a number from {6 * LEAST} on, found {total}"
    for name in ("MODEL", "QUANTIZED", "TEXT", "STATISTICS"):
        if variables.get(name) and not Path(variables[name]).exists():
            return f"{name}: expected a file or folder, found none at {variables[name]}"
    folder = Path(arguments[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return "" if free >= SPACE else f"{folder}: expected {SPACE >> 30} GiB of free space, found {free / 2**30:.2f}"


def main() -> int:
    """Run the suite and pack its results.

    Returns:
        0 where every step passed, 1 where one did not, 2 for a mistake, 130 or 143 after an interruption.
    """
    problem = refusal(sys.argv[1:], os.environ)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    results = Path(sys.argv[1]).resolve()
    total = float(os.environ.get("SUITE_SECONDS", SECONDS))
    suite = Suite(results, os.environ.get("PYTHON", sys.executable), total, os.environ)
    summary, status = Summary(results / "suite.md"), 0
    with interruptible():
        try:
            run(suite, summary)
            status = 0 if all(row.passed for row in summary.rows) else 1
        except Interrupted as interrupted:
            status = 128 + interrupted.signal
        print(summary.text(), end="", flush=True)
        folders = {ROOT: ".", results: "RESULTS", Path(tempfile.gettempdir()): "TMP", Path.home(): "HOME"}
        try:
            print(f"archive: {pack(results, Scrubber(folders, names_here()))}", flush=True)
        except OSError as error:
            print(f"error: {results}.tar.gz: {error.strerror}", file=sys.stderr)
            status = status or 1
    return status


if __name__ == "__main__":
    sys.exit(main())

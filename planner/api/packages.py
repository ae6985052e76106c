"""The packages that a command needs besides the plain installation. It names missing ones before it opens anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.api.unread import Values
from planner.common.install import install_line, missing, require
from planner.text.sources import is_dataset
from planner.text.tables import PARQUET

MODEL = ("transformers", "accelerate")
"""Packages that run a model over a text."""


@dataclass(frozen=True)
class PackagesFor:
    """One reason for which commands need packages.

    Attributes:
        commands: names of the commands.
        reason: returns the flag that needs the packages, for a message; None where nothing does.
        packages: names of modules.
        extra: the extra that brings them.
        without: what the command does where they are missing; None where it cannot go on.
    """

    commands: tuple[str, ...]
    reason: Callable[[Values], str | None]
    packages: tuple[str, ...]
    extra: str
    without: str | None = None


def require_packages(command: str, values: Values, note: Callable[[str], object] | None = None) -> None:
    """Require the packages that some arguments need, and say what is left out for want of others.

    Args:
        command: the command.
        values: all its parameters.
        note: is told what is left out.

    Raises:
        UsageError: some are not installed; the message says which flag needs them, and how to install them.
    """
    for row in ROWS:
        reason = row.reason(values) if command in row.commands else None
        if reason is None:
            continue
        if row.without is None:
            require(reason, row.packages, row.extra)
        elif note is not None and (absent := missing(row.packages)):
            note(f"note: {row.without}: {' and '.join(absent)} is not installed: {install_line(row.extra)}")


def _named_dataset(values: Values) -> str | None:
    data = values["data"]
    return f"--data {data}" if data is not None and is_dataset(str(data)) else None


def _parquet(values: Values) -> str | None:
    for name in ("data", "held_out"):
        if values.get(name) is not None and _starts_with(Path(values[name]), PARQUET):
            return str(values[name])
    return None


def _starts_with(path: Path, first: bytes) -> bool:
    """Tell whether a file begins with some bytes; one that cannot be read is refused elsewhere."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(first)) == first
    except OSError:
        return False


def _given(flag: str, name: str) -> Callable[[Values], str | None]:
    return lambda values: flag if values.get(name) else None


def _tasks(values: Values) -> str | None:
    return "tasks" if values.get("tasks") or values.get("suite") else None


def _served_tasks(values: Values) -> str | None:
    return "--backend vllm" if _tasks(values) and values["backend"] == "vllm" else None


def _benched(values: Values) -> str | None:
    return "moeq bench" if values["gpu_report"] is None else None


def _always(reason: str) -> Callable[[Values], str | None]:
    return lambda _: reason


CALIBRATED = ("plan", "quantize", "calibrate")
TEXTS = (*CALIBRATED, "compare", "eval")

ROWS: Sequence[PackagesFor] = (
    PackagesFor(CALIBRATED, _given("--data", "data"), MODEL, "calibrate"),
    PackagesFor(("compare",), _always("moeq compare"), MODEL, "calibrate"),
    PackagesFor(("eval",), _given("--data", "data"), MODEL, "eval"),
    PackagesFor((*CALIBRATED, "compare"), _named_dataset, ("datasets",), "calibrate"),
    PackagesFor(TEXTS, _parquet, ("pyarrow",), "calibrate"),
    PackagesFor(("compare", "eval"), _tasks, ("lm_eval", *MODEL), "eval"),
    PackagesFor(("eval",), _served_tasks, ("vllm",), "gpu"),
    PackagesFor(("serve",), _always("moeq serve"), ("vllm",), "gpu"),
    PackagesFor(("bench",), _benched, ("vllm",), "gpu"),
    PackagesFor(("lm-eval",), _always("moeq lm-eval"), ("lm_eval", *MODEL), "eval"),
    PackagesFor(("quantize",), _given("--ray", "ray"), ("ray",), "ray"),
    PackagesFor(("report",), _given("--png", "png"), ("matplotlib",), "report"),
    PackagesFor(("compare",), _always("moeq compare"), ("matplotlib",), "report", without="there will be no plot"),
)
"""The rows, in the order in which they are asked."""

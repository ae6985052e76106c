"""The parts that a run expects are what it does: names, order and number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.common.schedule import Schedule
from tests.conftest import Outcome
from tests.paths import CALIBRATION_TEXT, MIXTRAL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Moeq = Callable[..., Outcome]

TEXT = ("--data", CALIBRATION_TEXT, "--samples", 2, "--seq-len", 64)
RUNS = {
    "kl": ("quantize", MIXTRAL, *TEXT),
    "weights": ("quantize", MIXTRAL, "--quantizer", "rtn"),
    "measures": ("calibrate", MIXTRAL, *TEXT, "--for", "pmq,bsp,gemq,kl-estimated"),
    "hessian": ("calibrate", MIXTRAL, "--data", CALIBRATION_TEXT, "--samples", 1, "--seq-len", 16, "--for", "hessian"),
    "trellises": ("calibrate", MIXTRAL, *TEXT, "--for", "kl-estimated", "--scheme", "trellis"),
    "a plan alone": ("plan", MIXTRAL, *TEXT, "--method", "gemq"),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_part_is_done_and_nothing_else(
    run: str, moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    expected: list[list[str]] = []

    class Recorded(Schedule):
        def enter(self, name: str, total: int, now: float) -> None:
            done.append(name)
            expected.append(list(self._names))
            super().enter(name, total, now)

    monkeypatch.setattr("planner.common.progress.Schedule", Recorded)
    found = moeq(*RUNS[run], "-o", tmp_path / "out.safetensors")
    assert found.code == 0, found.err
    assert [list(parts) for parts in {tuple(parts) for parts in expected}] == [done]


@pytest.mark.parametrize("run", ["weights", "measures"])
def test_json_stays_clean(run: str, moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.common.progress.SECONDS_BETWEEN_LINES", 0.0)
    found = moeq(*RUNS[run], "--json", "-o", tmp_path / "out.safetensors")
    json.loads(found.out)
    lines = found.err.splitlines()
    first = next(line for line in lines if not line.startswith("method auto:"))
    assert " in all" in first
    assert any(" left" in line for line in lines)

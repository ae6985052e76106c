"""``moeq bench --gpu-report`` refuses what it cannot do, and hands on what the suite of a clone found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from planner.evaluation import gpu_suite
from tests.benchmarks.rehearsal import HOST, USER, Rehearsal
from tests.conftest import Outcome, one_line
from tests.paths import ROOT
from vllm_moeq.format import UsageError

Moeq = Callable[..., Outcome]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(moeq: Moeq, tmp_path: Path) -> None:
    refusal = one_line(moeq("bench", "--gpu-report", tmp_path / "report"))
    assert "--gpu-report: expected a GPU that torch" in refusal
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("card")
def test_without_triton(moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert "--gpu-report: the triton package is missing" in one_line(moeq("bench", "--gpu-report", tmp_path / "x"))


def test_outside_of_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--gpu-report: expected a clone of the repository, found no benchmarks/gpu"):
        gpu_suite.find_script(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert gpu_suite.find_script() == ROOT / gpu_suite.SCRIPT


@pytest.mark.usefixtures("card")
def test_a_folder_that_is_taken(moeq: Moeq, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "suite.md").write_text("an earlier run")
    assert "expected a new or an empty folder, found" in one_line(moeq("bench", "--gpu-report", tmp_path / "report"))
    (tmp_path / "other.tar.gz").write_text("an earlier archive")
    assert "without an archive beside it" in one_line(moeq("bench", "--gpu-report", tmp_path / "other"))


@pytest.mark.parametrize(
    ("words", "flag"), [("model", "DIR"), ("--json", "--json"), ("--requests 3", "--requests"), ("--url x", "--url")]
)
def test_what_would_be_ignored(moeq: Moeq, tmp_path: Path, words: str, flag: str) -> None:
    refusal = one_line(moeq("bench", *words.split(), "--gpu-report", tmp_path / "x"))
    assert f"{flag}: expected no --gpu-report with it" in refusal


@pytest.mark.slow
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("play", "code"), [("print('it works')", 0), ("raise SystemExit(1)", 1)])
def test_the_archive_is_named(
    moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: str, code: int
) -> None:
    rehearsal = Rehearsal(tmp_path, pytest=play)
    for name in ("PYTHON", "HOME", "USER", "LOGNAME", "HOSTNAME", "TMPDIR", "RESULTS"):
        monkeypatch.setenv(name, rehearsal.environment[name])
    outcome = moeq("bench", "--gpu-report", rehearsal.results)
    assert outcome.code == code, outcome.err
    assert f"Attach {rehearsal.results}.tar.gz to an issue of the repository" in " ".join(outcome.out.split())
    everything = "\n".join(rehearsal.archive().values())
    assert "| tests | passed |" in everything or code
    assert not [secret for secret in (USER, HOST, str(rehearsal.home)) if secret in everything]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_waits_for_the_archive(tmp_path: Path, number: signal.Signals, code: int) -> None:
    rehearsal = Rehearsal(tmp_path, pytest="import time; (results / 'began').touch(); time.sleep(100)")
    script = (
        "import sys; from pathlib import Path; from planner.common.interrupts import interruptible\n"
        "from planner.evaluation.gpu_suite import find_script, run_suite\n"
        "with interruptible(): sys.exit(run_suite(find_script(), Path(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(rehearsal.results)], env=rehearsal.environment, cwd=ROOT,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (rehearsal.results / "began").exists() and time.monotonic() < until:
        time.sleep(0.1)
    ended = threading.Timer(60, process.kill)
    ended.start()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # what a terminal does
    else:
        process.send_signal(number)
    assert process.wait() == code
    ended.cancel()
    assert "| tests | interrupted |" in rehearsal.archive()["gpu-report/suite.md"]

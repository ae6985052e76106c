"""Runs that are killed at any moment continue to the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions
from planner.quantization.run import quantize
from planner.quantization.runners import InlineRunner, ProcessRunner, Runner
from planner.quantization.settings import QuantizeSettings, default_linear
from tests.conftest import one_line
from tests.folders import contents
from tests.paths import MIXTRAL
from tests.shipped import MIXTRAL_SIZES
from tests.tiers import thorough
from vllm_moeq.format import UsageError, verify

pytestmark = pytest.mark.slow


Moeq = Callable[..., Any]


def write(output: Path, runner: Runner) -> None:
    torch.set_num_threads(1)
    with SourceModel(MIXTRAL) as model:
        layout = read_layout(model)
        made = make_plan(model, layout, PlanOptions(Fraction("2.5"), (1, 2, 3)), Progress(quiet=True))
        settings = QuantizeSettings(quantizer="rtn", linear=default_linear(model, layout, 4))
        quantize(model, layout, made, output, settings, Progress(quiet=True), runner=runner)


def continue_(output: Path, runner: Runner) -> None:
    """Write again, once the killed run's own processes have died with it."""
    for _ in range(500):
        try:
            return write(output, runner)
        except UsageError as error:
            if "another run is writing this output" not in str(error):
                raise
        time.sleep(0.01)
    raise AssertionError(f"{output} is still locked")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kills", thorough([3, 10], [3]))
@pytest.mark.parametrize("runner", [InlineRunner(1), ProcessRunner(1, ["cpu", "cpu"], "fork")], ids=["inline", "jobs"])
def test_killed_at_random_moments(tmp_path: Path, runner: Runner, kills: int) -> None:
    context = multiprocessing.get_context("fork")
    generator = random.Random(4)
    write(tmp_path / "warm-up", runner)
    began = time.monotonic()
    write(tmp_path / "whole", runner)
    whole, expected = time.monotonic() - began, contents(tmp_path / "whole")
    killed = 0
    for number in range(kills):
        output = tmp_path / str(number)
        process = context.Process(target=write, args=(output, runner))
        process.start()
        process.join(generator.uniform(0, whole))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert output.exists() or process.exitcode != 0  # it may be killed once the output is complete
        if not output.exists():
            continue_(output, runner)
        found = contents(output)
        if process.exitcode != 0:  # and before it has removed its own files there
            found = {name: data for name, data in found.items() if name in expected or not OWN.search(name)}
        assert found == expected
    assert killed > kills // 2


OWN = re.compile(r"^(\.lock|fingerprint\.json|planned-from-.*\.json|.*\.safetensors\.json)$")
"""Files of an unfinished run."""

INTERRUPTED = """
import os, signal, sys
from pathlib import Path
import planner.cli, planner.output.files
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
sync = planner.output.files.sync
def interrupt(path):
    if list(Path(sys.argv[-1] + ".partial").glob("*.safetensors")):
        planner.output.files.sync = sync
        os.killpg(0, signal.SIGINT)
    sync(path)
planner.output.files.sync = interrupt
planner.cli.main()
"""
"""The command, which has Ctrl-C sent to it and its workers when it has written the first shard: no clock is in it."""


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The name of an output whose run was interrupted."""
    output = tmp_path / "out"
    command = [sys.executable, "-c", INTERRUPTED, "quantize", str(MIXTRAL), "--jobs", "2", "-o", str(output)]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, start_new_session=True, check=False)
    assert run.returncode == 130
    assert run.stderr.splitlines()[-1].startswith(f"interrupted; kept: {output}.partial (")
    assert "Traceback" not in run.stderr
    return output


def identity(path: Path) -> tuple[int, int]:
    """Inodes alone are used again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_resume_and_no_resume(moeq: Moeq, interrupted: Path) -> None:
    partial = interrupted.with_name("out.partial")
    assert not list(partial.glob(".*.tmp"))
    files = {path.name: identity(path) for path in partial.glob("*.safetensors")}
    assert files

    message = one_line(moeq("quantize", MIXTRAL, "--one-bit", "rtn", "-o", interrupted))
    assert "an unfinished run with other settings (one_bit); start anew with --no-resume" in message

    arguments = ("quantize", MIXTRAL, "-o", interrupted)
    assert moeq(*arguments, "--resume").code == 0
    assert files.items() <= {path.name: identity(path) for path in interrupted.iterdir()}.items()

    interrupted.rename(partial)  # as if unfinished
    (partial / "fingerprint.json").write_text("{}")
    assert moeq(*arguments).code == 2
    assert moeq(*arguments, "--no-resume").code == 0
    assert verify(interrupted).experts == MIXTRAL_SIZES.all_experts
    assert not files.items() & {path.name: identity(path) for path in interrupted.iterdir()}.items()


@pytest.mark.parametrize("flag", ["--resume", "--no-resume"])
def test_a_folder_of_something_else_is_left_alone(moeq: Moeq, tmp_path: Path, flag: str) -> None:
    stranger = tmp_path / "out.partial" / "thesis.txt"
    stranger.parent.mkdir()
    stranger.write_text("mine")
    message = one_line(moeq("quantize", MIXTRAL, "-o", tmp_path / "out", flag))
    assert "expected an unfinished run, found thesis.txt of something else" in message
    assert stranger.read_text() == "mine"

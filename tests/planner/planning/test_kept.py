"""Runs that are killed or interrupted after planning take the finished plan, and write the same bytes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import planner.output.files
from planner.calibration.measures import MEASURES
from tests.conftest import Outcome, one_line
from tests.faults.commands import Command, run
from tests.folders import contents
from tests.paths import MIXTRAL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Moeq = Callable[..., Outcome]

SHORT = ("--data", "text.txt", "--samples", "2", "--seq-len", "32")
WAYS = {"text": ("--method", "kl", *SHORT), "weights": ("--method", "alphaq", "--quantizer", "rtn")}
NAMES = {"text": "planned-from-text.json", "weights": "planned-from-weights.json"}


def kill_at_the_first_shard(_: Path) -> None:
    sync = planner.output.files.sync

    def kills(path: Path) -> None:
        if list(Path("out.partial").glob("model-*.safetensors")):
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    planner.output.files.sync = kills


@pytest.fixture(scope="module", params=WAYS)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the whole output ``whole`` and a killed run of ``out``; and whether the plan is of a text."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "model").symlink_to(MIXTRAL)
    (folder / "text.txt").write_text((MIXTRAL / "held_out.txt").read_text()[:3000])
    arguments = ("quantize", "model", *WAYS[request.param], "-o")
    assert run(folder, Command((*arguments, "whole"), "whole", "", 0))[0] == 0
    assert run(folder, Command((*arguments, "out"), "out", "", 1), kill_at_the_first_shard)[0] == -signal.SIGKILL
    assert (folder / "out.partial" / NAMES[request.param]).is_file()
    return folder, request.param


@pytest.fixture
def cut(killed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """The same in a folder of the test's own, which is the working directory."""
    folder = tmp_path / "cut"
    shutil.copytree(killed[0], folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder, killed[1]


of_a_text = pytest.mark.parametrize("killed", ["text"], indirect=True)
"""Only the way with a text."""


def forbid_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("expected the plan that was made before")

    for name in ("planner.planning.statistics.collect", "planner.api.quantizing.make_plan"):
        monkeypatch.setattr(name, planned)


def test_a_killed_run_does_not_plan_again(cut: tuple[Path, str], moeq: Moeq, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, way = cut
    forbid_planning(monkeypatch)
    found = moeq("quantize", "model", *WAYS[way], "-o", "out")
    assert found.code == 0, found.err
    assert "plan: made by an earlier run" in found.err.splitlines()
    assert contents(folder / "out") == contents(folder / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out", "text.txt", "whole"]


@pytest.mark.parametrize("flags", [("--avg-bits", "2"), ("--bits", "2,3,4")])
def test_another_plan_is_refused_before_planning(
    cut: tuple[Path, str], moeq: Moeq, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str]
) -> None:
    folder, way = cut
    before = sorted((folder / "out.partial").rglob("*"))
    forbid_planning(monkeypatch)
    message = one_line(moeq("quantize", "model", *WAYS[way], *flags, "-o", "out"))
    assert "an unfinished run with other plan (" in message
    assert "; start anew with --no-resume" in message
    assert sorted((folder / "out.partial").rglob("*")) == before


@of_a_text
def test_another_text_is_refused(cut: tuple[Path, str], moeq: Moeq, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, way = cut
    forbid_planning(monkeypatch)
    (folder / "text.txt").write_text((MIXTRAL / "held_out.txt").read_text()[3000:9000])
    message = one_line(moeq("quantize", "model", *WAYS[way], "-o", "out"))
    assert "an unfinished run with other calibration (" in message


def test_a_damaged_plan_is_refused(cut: tuple[Path, str], moeq: Moeq) -> None:
    folder, way = cut
    (folder / "out.partial" / NAMES[way]).write_text('{"plan": {}}')
    message = one_line(moeq("quantize", "model", *WAYS[way], "-o", "out"))
    assert f"out.partial/{NAMES[way]}: expected a plan and its request" in message


def test_starts_anew(cut: tuple[Path, str], moeq: Moeq) -> None:
    folder, way = cut
    (folder / "out.partial" / NAMES[way]).write_text("damaged")
    assert moeq("quantize", "model", *WAYS[way], "-o", "out", "--no-resume").code == 0
    assert contents(folder / "out") == contents(folder / "whole")


def interrupt(*_arguments: Any, **_options: Any) -> Any:
    raise KeyboardInterrupt


class TestInterrupted:
    """An interruption between the statistics, the plan and the first shard."""

    @pytest.fixture(autouse=True)
    def clean(self, cut: tuple[Path, str]) -> str:
        shutil.rmtree("out.partial")
        return cut[1]

    def last_line(self, moeq: Moeq, way: str, *arguments: str) -> str:
        found = moeq(*(arguments or ("quantize", "model", *WAYS[way], "-o", "out")))
        assert found.code == 130
        return found.err.splitlines()[-1]

    def test_before_the_plan(self, clean: str, moeq: Moeq, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("planner.api.quantizing.make_plan", interrupt)
            line = self.last_line(moeq, clean)
        if clean == "weights":
            assert line == "interrupted; nothing is kept"
            return
        assert line.startswith("interrupted; kept: out.statistics.safetensors (")
        monkeypatch.setattr("planner.planning.statistics.collect", interrupt)
        assert moeq("quantize", "model", *WAYS[clean], "-o", "out").code == 0
        assert contents(Path("out")) == contents(Path("whole"))

    def test_before_the_first_shard(self, clean: str, moeq: Moeq, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("planner.quantization.run.plan_tasks", interrupt)
            line = self.last_line(moeq, clean)
        if clean == "weights":
            assert line == "interrupted; nothing is kept"
            assert sorted(path.name for path in Path().iterdir()) == ["model", "text.txt", "whole"]
            return
        assert line.startswith("interrupted; kept: out.partial (")
        assert sorted(path.name for path in Path().iterdir()) == ["model", "out.partial", "text.txt", "whole"]
        forbid_planning(monkeypatch)
        assert moeq("quantize", "model", *WAYS[clean], "-o", "out").code == 0
        assert contents(Path("out")) == contents(Path("whole"))

    @of_a_text
    @pytest.mark.parametrize("output", [(), ("-o", "plan.json")], ids=["shown", "written"])
    def test_of_a_plan_alone(
        self, clean: str, moeq: Moeq, monkeypatch: pytest.MonkeyPatch, output: tuple[str, ...]
    ) -> None:
        command = ("plan", "model", *WAYS[clean], *output)
        with monkeypatch.context() as patch:
            patch.setattr("planner.calibration.collect.MEASURES", _measures_that_interrupt())
            line = self.last_line(moeq, clean, *command)
        if not output:
            assert line == "interrupted; nothing is kept"
            return
        assert line.startswith("interrupted; kept: plan.json.statistics.safetensors.partial (")
        monkeypatch.setattr("planner.calibration.collect.observe", interrupt)  # no layer is run again
        assert moeq(*command).code == 0
        assert sorted(path.name for path in Path().iterdir()) == ["model", "plan.json", "text.txt", "whole"]


def _measures_that_interrupt() -> Any:
    return {name: dataclasses.replace(row, run=interrupt) for name, row in MEASURES.items()}

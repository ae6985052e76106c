"""All runners write the same bytes, and fail cleanly."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.plan_file import read_plan
from planner.quantization.layer_task import LayerTask, plan_tasks, run_task
from planner.quantization.run import quantize
from planner.quantization.runners import InlineRunner, ProcessRunner, Runner, Work, choose_runner
from planner.quantization.runners.choose import read_devices
from planner.quantization.runners.ray_cluster import RayRunner
from planner.quantization.settings import QuantizeSettings
from planner.reporting.card import write_card
from tests.conftest import one_line
from tests.folders import contents
from vllm_moeq.format import Linear, MoeqError, UsageError, verify

pytestmark = pytest.mark.slow

SETTINGS = QuantizeSettings(group_size=32, linear=Linear(bits=4, group_size=32))

Change = Callable[..., Any]
Moeq = Callable[..., Any]


class Lines(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def write(source: Path, plan: Path, output: Path, runner: Runner | None, progress: Progress | None = None) -> Path:
    with SourceModel(source) as model:
        layout, made, said = read_layout(model), read_plan(plan), progress or Progress(quiet=True)
        quantize(model, layout, made, output, SETTINGS, said, runner=runner, describe=write_card)
    return output


@pytest.fixture
def tasks(tiny_mixtral: Path, all_widths_plan: Path, tmp_path: Path) -> list[LayerTask]:
    with SourceModel(tiny_mixtral) as model:
        return plan_tasks(model, read_layout(model), read_plan(all_widths_plan), SETTINGS, tmp_path)


@pytest.mark.parametrize(
    "runner",
    [InlineRunner(1), InlineRunner(5), ProcessRunner(1, ["cpu", "cpu"]), ProcessRunner(2, ["cpu"] * 9, "fork")],
    ids=["one thread", "five threads", "two processes", "more processes than layers"],
)
def test_every_runner_writes_the_same_files(
    tiny_mixtral: Path, all_widths_plan: Path, quantized_mixtral: Path, tmp_path: Path, runner: Runner
) -> None:
    found = contents(write(tiny_mixtral, all_widths_plan, tmp_path / "out", runner))
    assert found == contents(quantized_mixtral)


def test_ray_writes_the_same_files(
    tiny_mixtral: Path, all_widths_plan: Path, quantized_mixtral: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    found = contents(write(tiny_mixtral, all_widths_plan, tmp_path / "out", RayRunner(jobs=2, threads=1)))
    assert found == contents(quantized_mixtral)


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--ray: expected the package ray, .*: pip install '\.\[ray\]'"):
        choose_runner(ray=True)


def test_a_task_survives_pickling_and_needs_nothing_else(tasks: list[LayerTask]) -> None:
    task = pickle.loads(pickle.dumps(tasks[0]))
    assert task == tasks[0]
    finished = run_task(task, 1, torch.device("cpu"))
    assert task.shard.is_file()
    assert task.entry.is_file()
    assert [report.expert for report in finished.experts] == list(range(8))


def test_tasks_cover_every_tensor_once(tiny_mixtral: Path, tasks: list[LayerTask]) -> None:
    names = [name for task in tasks for name in (*task.linears, *task.kept)]
    for task in tasks:
        if task.layer:
            projections = task.layer.projections.names()
            names += [task.layer.weight(e, p) for e in range(task.layer.num_experts) for p in projections]
    with SourceModel(tiny_mixtral) as model:
        assert sorted(names) == sorted(model.shards.tensors)


@pytest.mark.parametrize("runner", [InlineRunner(1), ProcessRunner(1, ["cpu", "cpu"])], ids=["inline", "processes"])
def test_an_error_in_a_task_is_the_runs(
    mixtral_copy: Path, all_widths_plan: Path, change_tensor: Change, tmp_path: Path, runner: Runner
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    change_tensor(mixtral_copy, name, lambda weight: weight / 0)
    with pytest.raises(MoeqError, match=f"tensor {name}: expected finite weights"):
        write(mixtral_copy, all_widths_plan, tmp_path / "out", runner)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial/.*.tmp"))


@dataclasses.dataclass(frozen=True)
class Deadly(LayerTask):
    """Kills its process, as the system does when memory runs out."""

    @property
    def entry(self) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_process_is_a_clear_error(tasks: list[LayerTask]) -> None:
    deadly = Deadly(**{field.name: getattr(tasks[1], field.name) for field in dataclasses.fields(LayerTask)})
    work = Work((tasks[0], deadly), (tasks[0], deadly))
    with pytest.raises(MoeqError, match=r"layers\.1\..*: its process was killed by SIGKILL \(out of memory\?") as error:
        list(ProcessRunner(1, ["cpu", "cpu"], "fork").run(work))
    assert "the same command continues" in str(error.value)


def test_an_unexpected_error_keeps_its_traceback(tasks: list[LayerTask]) -> None:
    broken = dataclasses.replace(tasks[0], widths=(7,) * 8)
    with pytest.raises(RuntimeError, match=r"unexpected error\nTraceback"):
        list(ProcessRunner(1, ["cpu"], "fork").run(Work((broken,), (broken,))))


def test_closing_a_runner_ends_its_processes(tasks: list[LayerTask]) -> None:
    before = set(_children())
    running = ProcessRunner(1, ["cpu", "cpu"], "fork").run(Work(tuple(tasks), tuple(tasks)))
    next(running)
    assert set(_children()) - before
    running.close()
    assert set(_children()) == before


def _children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


def test_every_layer_has_its_line(tiny_mixtral: Path, all_widths_plan: Path, tmp_path: Path) -> None:
    progress = Lines()
    write(tiny_mixtral, all_widths_plan, tmp_path / "out", ProcessRunner(1, ["cpu", "cpu"], "fork"), progress)
    assert len(progress.lines) == 2
    for line in progress.lines:
        assert "1 × 8 bit, 1 × 4 bit, 2 × 3 bit, 2 × 2 bit, 2 × 1 bit; largest relative error" in line
        assert re.search(r" GiB; quantizing [123]/3, \d+ s, about \d+ s left$", line)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--jobs", "2", "--device", "cuda:99"), "--device: cuda:99: torch sees"),
        (("--device", "meta"), "--device: expected cpu, cuda or a list"),
        (("--device", "cpu,"), "--device: expected cpu, cuda or a list"),
        (("--device", "cpu,cpu"), "--device: expected each device once"),
    ],
)
def test_impossible_flags(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path, arguments: Any, fragment: str) -> None:
    assert fragment in one_line(moeq("quantize", tiny_mixtral, "-o", tmp_path / "out", "--group-size", 32, *arguments))
    assert not list(tmp_path.iterdir())


def test_jobs_of_the_command(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    outcome = moeq("quantize", tiny_mixtral, "-o", tmp_path / "out", "--group-size", 32, "--jobs", 2)
    assert (outcome.code, verify(tmp_path / "out").experts) == (0, 16)


def test_runners_follow_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_runner() == InlineRunner(8, "cpu")
    assert choose_runner(jobs=3) == ProcessRunner(2, ["cpu"] * 3)
    assert choose_runner(device="cuda") == ProcessRunner(4, ["cuda:0", "cuda:1"])
    assert choose_runner(3, "cuda:0,cuda:1") == ProcessRunner(2, ["cuda:0", "cuda:1", "cuda:0"])
    assert read_devices("cuda:1") == ["cuda:1"]
    with pytest.raises(UsageError, match="--jobs: expected at least one per device"):
        choose_runner(1, "cuda:0,cuda:1")
    if importlib.util.find_spec("ray"):
        assert choose_runner(4, "cuda", ray=True) == RayRunner(4, "cuda")

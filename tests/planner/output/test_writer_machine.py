"""Any order of writing, dying, damage and continuing leads to the same bytes, or to a refusal."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import planner.output.files
from planner.output.checkpoint import CheckpointWriter
from planner.output.files import write_json
from tests.folders import contents
from vllm_moeq.format import UsageError

SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
CONFIG = {"model_type": "mixtral", "auto_map": {"AutoConfig": "left.Behind"}}


class Died(BaseException):
    """What SIGKILL does: no handler runs but those that the process has no more."""


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {f"t{number}": torch.full((8, 8), float(number))}


def finish(writer: CheckpointWriter) -> None:
    for number, shard in enumerate(SHARDS):
        if not writer.has_shard(shard):
            writer.write_shard(shard, tensors(number))
    writer.finish(CONFIG, {"plan.json": {"version": 1}})


def whole() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        finish(CheckpointWriter(Path(folder) / "out", {"model": "a"}))
        return contents(Path(folder) / "out")


class Writing(RuleBasedStateMachine):
    """One output folder, and the runs that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.output = self.folder / "out"
        self.writer: CheckpointWriter | None = None

    def running(self) -> CheckpointWriter:
        assert self.writer is not None
        return self.writer

    @initialize()
    def begin(self) -> None:
        self.expected = whole()

    @precondition(lambda self: self.writer is None and not self.output.exists())
    @rule()
    def open(self) -> None:
        self.writer = CheckpointWriter(self.output, {"model": "a"})

    @precondition(lambda self: self.writer is not None)
    @rule(number=st.integers(0, 3))
    def write(self, number: int) -> None:
        writer = self.running()
        if not writer.has_shard(SHARDS[number]):
            writer.write_shard(SHARDS[number], tensors(number))

    @precondition(lambda self: self.writer is not None)
    @rule(number=st.integers(0, 3), sync=st.integers(1, 2))
    def die_while_writing(self, number: int, sync: int) -> None:
        """Before the file has its name, or just after."""
        writer, original, count = self.running(), planner.output.files.sync, 0

        def dying(path: Path) -> None:
            nonlocal count
            count += 1
            if count == sync:
                raise Died
            original(path)

        planner.output.files.sync = dying
        try:
            writer.write_shard(SHARDS[number], tensors(number))
        except Died:
            (writer.partial / ".left.1.tmp").write_bytes(b"half a shard")
        finally:
            planner.output.files.sync = original
        self.die()

    @precondition(lambda self: self.writer is not None)
    @rule()
    def die(self) -> None:
        self.running()._run.release()  # the system takes a dead process's lock
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule()
    def fail(self) -> None:
        self.running().abandon()
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule()
    def second_run(self) -> None:
        with pytest.raises(UsageError, match=r"out\.partial: another run is writing this output"):
            CheckpointWriter(self.output, {"model": "a"})

    @precondition(lambda self: self.writer is None and (self.folder / "out.partial" / "fingerprint.json").exists())
    @rule()
    def other_settings(self) -> None:
        with pytest.raises(UsageError, match="an unfinished run with other model"):
            CheckpointWriter(self.output, {"model": "b"})

    @precondition(lambda self: self.writer is None)
    @rule(number=st.integers(0, 3), keep=st.integers(0, 40))
    def damage(self, number: int, keep: int) -> None:
        """As a disk that lost what it had promised to keep."""
        path = self.folder / "out.partial" / SHARDS[number]
        if path.exists():
            path.write_bytes(path.read_bytes()[:keep])

    @precondition(lambda self: self.writer is not None)
    @rule()
    def finish(self) -> None:
        finish(self.running())
        self.writer = None
        assert contents(self.output) == self.expected
        assert b"auto_map" not in self.expected["config.json"]

    @invariant()
    def the_output_is_whole_or_not_there(self) -> None:
        if self.output.exists():
            assert contents(self.output) == self.expected
            assert not (self.folder / "out.partial").exists()

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.abandon()
        shutil.rmtree(self.folder)


Writing.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
TestWriting = Writing.TestCase


def test_a_folder_of_json_alone_is_worth_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", {"model": "a"})
    write_json(writer.partial / "x.json", {})
    writer.abandon()
    assert list(tmp_path.iterdir()) == []

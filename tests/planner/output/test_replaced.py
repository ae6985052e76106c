"""What stands under an output's name: older files are replaced where a command says so, nothing else ever is."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import planner
from planner.calibration.collect import collect
from planner.calibration.reading.text import calibration_text
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.output.checkpoint import CheckpointWriter
from planner.output.files import atomic, make_new, write_json
from tests.conftest import Outcome, one_line
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from vllm_moeq.format import CheckpointError, ConfigError, UsageError

MEANWHILE = "somebody made it while this run went on; move it away and run the same command again"


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null is
    except PermissionError:
        pytest.skip("only root makes devices")


def piped(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "a folder"),
    "pipe": (os.mkfifo, "a pipe or a device"),
    "device": (device, "a pipe or a device"),
    "link to a pipe": (piped, "a pipe or a device"),
}


def identity(path: Path) -> tuple[int, ...]:
    """Return what tells whether a file is still the same; looking where a link leads changes when it was last read."""
    found = os.lstat(path)
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path, (make, words) = tmp_path / "a.json", SPECIAL[kind]
    make(path)
    before = identity(path)
    with pytest.raises(UsageError, match=f"a.json: expected a file to write, found {words}"):
        write_json(path, 1)
    with pytest.raises(UsageError):
        overtaken(tmp_path / "b.json", os.mkfifo)
    assert identity(path) == before
    assert not list(tmp_path.glob(".*"))


def overtaken(path: Path, make: Callable[[Path], object], *, new: bool = False) -> None:
    """Write a file whose name somebody else takes meanwhile."""
    with atomic(path, new=new) as temporary:
        temporary.write_text("ours")
        make(path)


APPEARING: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("theirs"),
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to("nothing"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("kind", APPEARING)
def test_a_new_file_replaces_nothing(kind: str, flagged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flagged:  # as on a file system that does not know the flag
        monkeypatch.setattr("planner.output.files.NO_REPLACE", 1 << 20)
    write_json(tmp_path / "first.json", 1, new=True)
    assert (tmp_path / "first.json").read_text() == "1\n"
    path = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match=f"a.json: {MEANWHILE}"):
        overtaken(path, APPEARING[kind], new=True)
    assert path.is_symlink() or not path.is_file() or path.read_text() == "theirs"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (Path("/proc/self/mem"), "cannot read .Input/output error."),  # the first page of memory is never there
        (Path("none"), "cannot read .No such file or directory."),
    ],
)
def test_an_error_of_reading_names_what_is_copied(file: Path, message: str, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", {"a": 1})
    with pytest.raises(ConfigError, match=f"^{file}: {message}"):
        writer.copy(file.parent, [file.name])
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appeared_is_not_filled(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=MEANWHILE):
        make_new(tmp_path)


@pytest.mark.slow
class TestCommands:
    @pytest.mark.parametrize("kind", ["pipe", "link"])
    @pytest.mark.parametrize("command", ["plan", "report", "calibrate", "eval"])
    def test_the_output_is_refused_before_the_work(
        self, moeq: Callable[..., Outcome], quantized_mixtral: Path, tmp_path: Path, command: str, kind: str
    ) -> None:
        path = tmp_path / "out.safetensors"
        APPEARING[kind](path)
        before = identity(path)
        arguments = {
            "plan": (MIXTRAL, "--avg-bits", 2),
            "report": (quantized_mixtral,),
            "calibrate": (MIXTRAL, "--data", CALIBRATION_TEXT),
            "eval": (MIXTRAL, "--data", MIXTRAL / "held_out.txt", "--max-tokens", 64),
        }
        message = one_line(moeq(command, *arguments[command], "-o", path))
        found = {"pipe": "a pipe or a device", "link": "a link"}[kind]
        assert message in (
            f"error: {path}: expected a file to write, found {found}",
            f"error: {path}: the output exists already; choose another or delete it",
        )
        assert identity(path) == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_picture_beside_the_page(
        self, moeq: Callable[..., Outcome], quantized_mixtral: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("matplotlib")
        os.mkfifo(tmp_path / "page-experts.png")
        message = one_line(moeq("report", quantized_mixtral, "-o", tmp_path / "page.html"))
        assert "page-experts.png: expected a file to write, found a pipe or a device" in message
        assert not (tmp_path / "page.html").exists()

    @pytest.mark.parametrize("name", ["s.safetensors", "s.json"])
    def test_statistics_that_appear_during_a_calibration(self, tmp_path: Path, name: str) -> None:
        theirs, text = tmp_path / name, calibration_text(MIXTRAL, str(CALIBRATION_TEXT), 1, 32, 0)
        progress = Progress(listener=lambda _: theirs.write_text("theirs"))
        with SourceModel(MIXTRAL) as model, pytest.raises(CheckpointError, match=f"{name}: {MEANWHILE}"):
            collect(
                model, read_layout(model), text, tmp_path / "s.safetensors", {}, torch.device("cpu"), torch.float32,
                progress,
            )  # fmt: skip
        assert theirs.read_text() == "theirs"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "s.safetensors.partial"])
        theirs.unlink()

    def test_a_result_that_appears_during_an_evaluation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("planner.common.progress.SECONDS_BETWEEN_LINES", 0)  # a line for every step
        output, data = tmp_path / "result.json", MIXTRAL / "held_out.txt"
        with pytest.raises(planner.MoeqError, match=MEANWHILE):
            planner.evaluate(
                MIXTRAL, data=data, max_tokens=64, output=output, progress=lambda _: output.write_text("theirs")
            )
        assert output.read_text() == "theirs"

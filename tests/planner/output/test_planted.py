"""Folders that somebody else prepared: links under the names of coming files, and an output made meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from planner.output.checkpoint import CheckpointWriter
from planner.output.files import atomic, write_json
from vllm_moeq.format import CheckpointError, UsageError


def test_links_at_foreseeable_names_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.json", f".a.json.{os.getpid()}.tmp", ".a.json.tmp"):
        (folder / name).symlink_to(victim)
    write_json(folder / "a.json", {"new": 1})
    assert victim.read_text() == "precious"
    assert not (folder / "a.json").is_symlink()
    assert '"new"' in (folder / "a.json").read_text()


def test_a_temporary_file_is_new_and_random(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as first, atomic(tmp_path / "a") as second:
        assert first != second
        assert first.stat().st_size == second.stat().st_size == 0
        first.write_text("1")
        second.write_text("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    write_json(tmp_path / ("n" * 255), 1)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_json(tmp_path / ("n" * 256), 1)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("kind", ["empty folder", "file", "link"])
def test_an_output_that_appears_meanwhile_is_not_replaced(
    kind: str, flagged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flagged:  # as on a file system that does not know the flag
        monkeypatch.setattr("planner.output.files.NO_REPLACE", 1 << 20)
    output = tmp_path / "out"
    writer = CheckpointWriter(output, {"a": 1})
    if kind == "empty folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("theirs")
    else:
        output.symlink_to(tmp_path / "nothing")
    before = os.lstat(output).st_ino
    with pytest.raises(CheckpointError, match=r"out: somebody made it while this run went on; the result is kept in"):
        writer.finish({}, {})
    assert os.lstat(output).st_ino == before
    assert (tmp_path / "out.partial" / "config.json").is_file()


@pytest.mark.parametrize("name", [".lock", "fingerprint.json", "model-00001.safetensors", "hidden/0.bin"])
def test_links_in_an_unfinished_run_are_refused(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "out.partial" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    for resume in (True, False):
        with pytest.raises(UsageError, match=r"out\.partial/.*: expected no link in an unfinished run"):
            CheckpointWriter(tmp_path / "out", {"a": 1}, resume)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "name", [".x.tmp", ".tmpAbC123", "model-00001.safetensors", "model-00001.safetensors.json", "hidden/0.bin"]
)
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_in_an_unfinished_run_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    write_json(killed(tmp_path) / "x.json", 1)
    path = tmp_path / "out.partial" / name
    path.parent.mkdir(exist_ok=True)
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    found = {"folder": "a folder", "pipe": "a pipe or a device"}[kind]
    for resume in (True, False):
        with pytest.raises(UsageError, match=f"{name}: expected a file in an unfinished run, found {found}; delete"):
            CheckpointWriter(tmp_path / "out", {"a": 1}, resume)
    assert path.exists()


def test_a_folder_that_appears_as_a_temporary_file_changes_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", {"a": 1})
    (writer.partial / ".x.tmp").mkdir()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def killed(folder: Path) -> Path:
    """Leave an unfinished run, and return its folder."""
    writer = CheckpointWriter(folder / "out", {"a": 1})
    writer._run.release()  # the system takes a dead process's lock
    return writer.partial


def test_an_unfinished_run_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "fingerprint.json").write_text("{}")
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    for resume in (True, False):
        with pytest.raises(UsageError, match=r"out\.partial: expected an unfinished run of yours, found a link"):
            CheckpointWriter(tmp_path / "out", {"a": 1}, resume)
    assert (tmp_path / "elsewhere" / "fingerprint.json").is_file()

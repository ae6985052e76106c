"""Unfinished runs: a folder beside the output, owned by one process at a time, which a later run continues."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.common.interrupts import note_kept
from planner.output.files import TEMPORARY, reason, write_json
from planner.output.paths import check_output
from vllm_moeq.format import UsageError, read_json

PLANNED, PLANNED_FROM_TEXT = "planned-from-*.json", "planned-from-text.json"
"""Finished plans: a glob of all, and the name of one that took reading a text."""

WORTH_KEEPING = (
    "*.safetensors", "*.partial", PLANNED_FROM_TEXT, "result-*.json", "pass-*/*/states.json", "pass-*/*/hidden/*.json",
)  # fmt: skip
"""Globs of the files and folders that a later run can use. An unfinished run within another one is worth keeping."""

SHOWN = 5
"""Most fields of one part that a message names."""

SUFFIXES = (".bin", ".json", ".lock", ".safetensors")
"""Endings of the names of files that runs keep; no folder of theirs has one."""


class PartialRun:
    """The folder ``<output>.partial``, locked, with the fingerprint of the run that fills it.

    Args:
        output: path that the run will create.
        fingerprint: everything that decides the contents, under names that a message can show.
        resume: continue an unfinished run; otherwise delete it.

    Raises:
        UsageError: the output exists, its parent does not, another run writes it, an unfinished run had another
            fingerprint, or the partial folder is not of this program.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], resume: bool = True) -> None:
        self.folder = partial_folder(output)
        check_output(output)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        try:
            self.folder.mkdir(exist_ok=True)
            _refuse_strangers(self.folder)
            self._lock = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot write ({reason(error)})") from None
        try:
            self._claim(resume)
        except BaseException:
            os.close(self._lock)
            raise

    def _claim(self, resume: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.folder}: another run is writing this output") from None
        self._remove_temporary()  # a killed run may have left some
        path = self.folder / "fingerprint.json"
        if path.exists() and resume:
            refuse_other(self.folder, read_json(path), self._fingerprint)
            return
        others = [entry for entry in sorted(self.folder.iterdir()) if entry.name != ".lock"]
        if others and not path.exists():
            raise UsageError(f"{self.folder}: expected an unfinished run, found {others[0].name} of something else")
        for entry in sorted(others, key=lambda entry: entry == path):  # last the one that marks them as ours
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        try:
            write_json(path, self._fingerprint)
        except BaseException:
            self._remove_if_empty()
            raise

    def abandon(self) -> None:
        """Keep the files that a later run can use, and remove everything else; call this while handling an error."""
        self._remove_temporary()
        self._remove_if_empty()
        note_kept(self.folder)
        self.release()

    def release(self) -> None:
        """Release the lock, so that others can claim the folder."""
        os.close(self._lock)

    def _remove_temporary(self) -> None:
        for leftover in self.folder.glob(TEMPORARY):
            if not leftover.is_dir():
                leftover.unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        if not any(found for pattern in WORTH_KEEPING for found in self.folder.glob(pattern)):
            shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(output: Path) -> Path:
    """Return the folder in which the unfinished run of an output lies."""
    return output.with_name(f"{output.name}.partial")


def refuse_other(folder: Path, found: Any, expected: Mapping[str, Any]) -> None:
    """Refuse to continue a run with another fingerprint.

    Args:
        folder: the unfinished run.
        found: its fingerprint, or the part of it that decided a plan.
        expected: the same of this run.

    Raises:
        UsageError: they differ; the message names the differences.
    """
    if found == expected:
        return
    before = found if isinstance(found, dict) else {}
    differs = [name + _parts(before.get(name), value) for name, value in expected.items() if before.get(name) != value]
    raise UsageError(
        f"{folder}: an unfinished run with other {' and '.join(differs) or 'program version'}; "
        "start anew with --no-resume, delete that folder or choose another output"
    )


def _parts(before: Any, now: Any) -> str:
    """Return the names of the fields that differ, in brackets; nothing where these are no objects."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    names = [str(name) for name in dict.fromkeys((*now, *before)) if before.get(name) != now.get(name)]
    return f" ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"


def _refuse_strangers(folder: Path) -> None:
    """Refuse an unfinished run with what we never make: writing through a link, for one, would change other files.

    Raises:
        UsageError: naming the first of them, or the folder if it is a link or another user's.
    """
    if folder.is_symlink() or os.lstat(folder).st_uid != os.geteuid():
        raise UsageError(f"{folder}: expected an unfinished run of yours, found a link or another user's folder")
    for entry in sorted(folder.rglob("*")):
        wrong = _stranger(entry)
        if wrong is not None:
            raise UsageError(f"{entry}: {wrong}; delete the folder")


def _stranger(entry: Path) -> str | None:
    """Return what is wrong with an entry of an unfinished run, or None."""
    try:
        mode = os.lstat(entry).st_mode
    except FileNotFoundError:
        return None  # another run is at work
    if stat.S_ISLNK(mode):
        return "expected no link in an unfinished run, found one"
    if stat.S_ISDIR(mode):
        named_as_file = entry.suffix in SUFFIXES or entry.match(TEMPORARY)
        return "expected a file in an unfinished run, found a folder" if named_as_file else None
    return None if stat.S_ISREG(mode) else "expected a file in an unfinished run, found a pipe or a device"

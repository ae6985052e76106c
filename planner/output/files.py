"""Write files that are whole or absent: a sibling temporary file, fsync, rename, directory fsync."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_moeq.format import CheckpointError, ConfigError, UsageError, first_problem, read_json
from vllm_moeq.format.fields import MAX_NAMES
from vllm_moeq.format.problems import refuse_crowds

Kind = TypeVar("Kind", bound=BaseModel)

TEMPORARY = ".*tmp*"
"""Glob of the temporary files that a killed run leaves: ours, and safetensors' own (``.tmpAbC123``)."""


SHARD_COPIES = 2
"""Number of copies of a shard in memory: the packed tensors, and the bytes that safetensors writes."""


@contextmanager
def atomic(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` and put it in place when the block succeeds.

    The temporary file is new and has a random name, since a folder that somebody else made may hold links under any
    name that can be foreseen. A link at ``path`` itself is replaced and not followed.

    Args:
        path: the file to write.
        new: refuse a file that appeared under this name meanwhile; otherwise it is replaced.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or somebody made the file meanwhile; nothing is
            left behind.
        UsageError: see :func:`refuse_special`.
    """
    try:
        if not new:
            refuse_special(path)
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write ({reason(error)})") from None
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors creates its files with mode 0600
        sync(temporary)
        if new:
            _place_new(temporary, path)
        else:
            refuse_special(path)
            temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot write ({reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def refuse_special(path: Path, *, links: bool = True) -> None:
    """Refuse to replace what is no regular file: who names a pipe or a device wants to write into it.

    Args:
        path: the file to write.
        links: whether a link may be replaced that leads to a file or to nothing.

    Raises:
        UsageError: something else than a file has the name; the message says what.
        OSError: the name is too long, or its folder cannot be searched.
    """
    try:
        mode = path.stat(follow_symlinks=links).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        found = next((words for is_one, words in SPECIAL if is_one(mode)), "a pipe or a device")
        raise UsageError(f"{path}: expected a file to write, found {found}")


SPECIAL = ((stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a link"))
"""The kinds of files that a message names by themselves."""


def _place_new(temporary: Path, path: Path) -> None:
    try:
        rename_new(temporary, path)
    except FileExistsError:
        raise CheckpointError(f"{path}: {APPEARED}") from None


APPEARED = "somebody made it while this run went on; move it away and run the same command again"


def make_new(folder: Path) -> None:
    """Make the folder that a command writes when its work is done.

    Raises:
        CheckpointError: somebody made it meanwhile, or its parent cannot be written.
    """
    try:
        folder.mkdir()
    except FileExistsError:
        raise CheckpointError(f"{folder}: {APPEARED}") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write ({reason(error)})") from None


NO_REPLACE = 1
"""Linux's flag of renameat2."""


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder or file to a name that nothing has; a plain rename would replace a file or an empty folder.

    Raises:
        FileExistsError: something has the name.
        OSError: it cannot be renamed.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        here = -100  # AT_FDCWD
        if call(here, os.fsencode(source), here, os.fsencode(target), NO_REPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):  # the file system may not know the flag
            raise OSError(number, os.strerror(number), str(target))
    if source.is_dir():
        target.mkdir()
    else:
        target.touch(exist_ok=False)
    source.rename(target)  # replaces what has just been made


def read_as(path: Path, kind: type[Kind]) -> Kind:
    """Read JSON and validate it.

    Raises:
        ConfigError: the file is no JSON, or its contents do not fit ``kind``; names the file and the first violation.
    """
    return validated(path, read_json(path), kind)


def validated(path: Path, data: Any, kind: type[Kind]) -> Kind:
    """Validate data that :func:`read_json` has read; see :func:`read_as`."""
    refuse_crowds(data, str(path), MAX_NAMES)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None


def write_json(path: Path, value: Any, *, new: bool = False) -> None:
    """Write JSON atomically; see :func:`atomic`."""
    with atomic(path, new=new) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, new: bool = False) -> None:
    """Write a safetensors file atomically; see :func:`atomic`."""
    with atomic(path, new=new) as temporary:
        save_file(dict(tensors), str(temporary), metadata={"format": "pt"})


def reason(error: Exception) -> str:
    """Return the reason why a file operation failed, without the path."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error)


def sync(path: Path) -> None:
    """Flush a file's or folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Read an untrusted folder: JSON within bounds, and no file from outside the folder."""

from __future__ import annotations

import gc
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_moeq.format.errors import CheckpointError, ConfigError

MAX_JSON_BYTES = 32 << 20
MAX_CONFIG_BYTES = 4 << 20
"""The limit of a config.json. The widths and schemes of the 23,000 experts of a trillion weights take a quarter."""
MAX_WIDE_BYTES = 8 << 20
"""The limit if not all is ASCII: one other character, escaped or not, makes a string take four bytes per character."""
MAX_JSON_VALUES = 1 << 20
"""Counted as commas, colons and opening brackets. A value takes 70 bytes of memory on average, and 250 at most."""
MAX_JSON_DEPTH = 64


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file that anybody may have made, for reading. A pipe's other end is not waited for.

    Raises:
        ConfigError: no regular file, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read ({error.strerror})") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ConfigError(f"{path}: expected a regular file, found {found}")
    return io.BufferedReader(io.FileIO(descriptor))


def read_bytes(path: Path, most: int) -> bytes:
    """Return the contents of a file that anybody may have made.

    Args:
        path: the file.
        most: largest number of bytes that it may have.

    Raises:
        ConfigError: no regular file, it cannot be read, or it is larger.
    """
    with open_regular(path) as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise ConfigError(f"{path}: cannot read ({error.strerror})") from None
        if len(data) > most:
            raise ConfigError(f"{path}: expected at most {most} bytes, found {os.fstat(file.fileno()).st_size}")
    return data


def read_config_json(path: Path) -> Any:
    """Parse a config.json; see :func:`read_json`."""
    return read_json(path, MAX_CONFIG_BYTES)


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file with a bounded size, number of values and depth; size and number are checked before parsing.

    Args:
        path: the file.
        most: largest number of bytes that it may have.

    Raises:
        ConfigError: the file is missing, too large, too deep, not a regular file or not JSON.
    """
    if not path.exists():
        raise ConfigError(f"{path}: expected a JSON file, found no file")
    return parse_json(read_bytes(path, most), str(path))


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON text; see :func:`read_json`.

    Args:
        data: the text in UTF-8.
        where: its name in error messages, usually the file's path.

    Raises:
        ConfigError: the text is too large or too deep, an object has a key twice, or the text is not JSON.
    """
    text = json_text(data, where)
    del data  # the caller may keep none: a long text is in memory once
    with invalid_json(where), no_collection():
        parsed = json.loads(text, object_pairs_hook=unique)
        if is_deep(parsed):
            raise RecursionError
    return parsed


def json_text(data: bytes, where: str) -> str:
    """Decode JSON text, if it would not take much memory when it is parsed.

    Args:
        data: the text in UTF-8.
        where: its name in error messages, usually the file's path.

    Raises:
        ConfigError: the text has too many values, has too many bytes for one that is not all ASCII, or is not UTF-8.
    """
    if len(data) > MAX_WIDE_BYTES and not (data.isascii() and b"\\u" not in data):
        raise ConfigError(f"{where}: expected at most {MAX_WIDE_BYTES} bytes of text that is not all ASCII")
    values = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if values > MAX_JSON_VALUES:
        raise ConfigError(f"{where}: expected at most {MAX_JSON_VALUES} values, found {values}")
    with invalid_json(where):
        return data.decode("utf-8")


@contextmanager
def invalid_json(where: str) -> Iterator[None]:
    """Turn what parsers raise for text that is not valid JSON, or too deep, into a ConfigError that names the file."""
    try:
        yield
    except RecursionError:
        raise ConfigError(f"{where}: not valid JSON (expected at most {MAX_JSON_DEPTH} levels)") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON ({error!s:.200})") from None


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn off garbage collection, which many lists would trigger often: parsed JSON has no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; refuse a key that stands twice, because readers disagree on which value counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.80} stands twice in one object")
    return found


def is_deep(value: Any) -> bool:
    """Tell whether containers are nested deeper than ``MAX_JSON_DEPTH``, so that recursive functions are safe."""
    waiting = [(value, 1)]
    while waiting:
        container, depth = waiting.pop()
        if type(container) in (dict, list):
            if depth > MAX_JSON_DEPTH:
                return True
            children = container.values() if type(container) is dict else container
            waiting += [(child, depth + 1) for child in children if type(child) in (dict, list)]
    return False


def check_inside(path: Path, root: Path | None = None) -> None:
    """Refuse a link that leads out of its folder, except in the Hub's cache, whose files are links to ``../../blobs``.

    There, ``blobs`` must be a folder: if it is a link itself, any file of the user could stand for a blob.

    Args:
        path: the file.
        root: the model's folder, if the file is in a folder below it.

    Raises:
        CheckpointError: the link leads out of its folder, in circles, or to no file.
    """
    if not path.is_symlink():
        return
    folder = (root or path.parent).resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: expected a file, found a link to none") from None
    if target.is_relative_to(folder):
        return
    if folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs":
        return
    raise CheckpointError(f"{path}: expected a file inside the folder, found a link to {target}")

"""Open a text file that anybody may have made: a regular file, unpacked where gzip packed it."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_moeq.format import ConfigError, UsageError
from vllm_moeq.format.files import open_regular

HEAD_BYTES = 1 << 16
"""Bytes at the beginning of a file by which its format is recognised."""

MAX_BLANK = 1 << 20
"""Blank lines that may follow each other; a gibibyte of them takes a mebibyte of a packed file."""

GZIP = b"\x1f\x8b"

UNREAD = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x28\xb5\x2f\xfd": "a file packed by zstd",
    b"\xfd7zXZ": "a file packed by xz",
    b"BZh": "a file packed by bzip2",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
}
"""First bytes → what begins so and is not read."""

EXPECTED = "expected a text file: UTF-8, JSON lines, JSON, CSV or parquet, possibly packed by gzip"

NO_TEXT = "expected a text, found none: the file is empty, or has blanks alone"


class TextFile:
    """An open file and its first bytes.

    Attributes:
        path: the file.
        stream: its contents, unpacked, from the beginning.
        head: up to :data:`HEAD_BYTES` of them.
        whole: whether ``head`` is everything.
    """

    def __init__(self, path: Path, stream: io.BufferedReader[Any]) -> None:
        self.path = path
        self.stream = stream
        self.head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        self.whole = len(self.head) < HEAD_BYTES

    def named(self, *endings: str) -> bool:
        """Tell whether the file's name has one of these endings, before ``.gz`` and in any case."""
        name = self.path.name.lower().removesuffix(".gz")
        return name.endswith(endings)


@contextmanager
def open_text(path: Path) -> Iterator[TextFile]:
    """Open a file; the caller's errors while reading become one line.

    Raises:
        UsageError: no regular file, no permission, damaged contents, or a kind of file that is not read.
    """
    try:
        with io.BufferedReader(open_regular(path).detach(), HEAD_BYTES) as raw:
            packed = raw.peek(len(GZIP)).startswith(GZIP)
            file = TextFile(path, io.BufferedReader(gzip.GzipFile(fileobj=raw), HEAD_BYTES) if packed else raw)
            _refuse_unread(file)
            yield file
    except ConfigError as error:
        raise UsageError(f"{error}; {EXPECTED}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: {EXPECTED}, found no UTF-8 ({error.reason})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: {EXPECTED}, found damaged gzip data ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: {EXPECTED}, cannot read ({error.strerror or error})") from None


def _refuse_unread(file: TextFile) -> None:
    for first, kind in UNREAD.items():
        if file.head.startswith(first):
            raise UsageError(f"{file.path}: {EXPECTED}, found {kind}")

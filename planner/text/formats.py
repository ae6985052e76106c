"""The formats of text files. A file's contents decide, and its name where they leave a choice."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.text import tables
from planner.text.documents import Document
from planner.text.files import EXPECTED, TextFile, open_text
from planner.text.json_values import is_json, read_json_documents
from vllm_moeq.format import UsageError

MAX_EMPTY = 1 << 17
"""Documents without a text that may follow each other; a small packed file has many millions."""


@dataclass(frozen=True)
class TextFormat:
    """A format of text files.

    Attributes:
        fits: tells by the beginning of a file whether it has this format.
        read: yields its documents; of a plain text at most the given number of characters.
    """

    fits: Callable[[TextFile], bool]
    read: Callable[[TextFile, int], Iterator[Document]]


def read_documents(path: Path, characters: int) -> Iterator[Document]:
    """Yield the documents of a file; a plain text is one document.

    Args:
        path: the file.
        characters: most characters to read of a plain text.

    Raises:
        UsageError: no such file, its contents are damaged, or too many empty texts follow each other; the message
            names file and line.
    """
    empty = 0
    with open_text(path) as file:
        found = next(it for it in FORMATS if it.fits(file))
        for document in found.read(file, characters):
            empty = empty + 1 if not document.messages and not (document.text or "").strip() else 0
            if empty > MAX_EMPTY:
                raise UsageError(f"{document.where}: expected a text, found {MAX_EMPTY} empty ones")
            yield document


def _read_plain(file: TextFile, characters: int) -> Iterator[Document]:
    if b"\0" in file.head:
        raise UsageError(f"{file.path}: {EXPECTED}, found binary data")
    yield Document(str(file.path), io.TextIOWrapper(file.stream, encoding="utf-8-sig").read(characters))


FORMATS = (
    TextFormat(tables.is_parquet, tables.read_parquet),
    TextFormat(is_json, read_json_documents),
    TextFormat(tables.is_csv, tables.read_csv),
    TextFormat(lambda _: True, _read_plain),
)
"""In the order in which they are tried; the last one takes everything. A new format is a row."""

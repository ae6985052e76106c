"""The formats of text files. A file's contents decide, and its name where they leave a choice."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.text import tables
from planner.text.documents import FIELDS, Document, document_of
from planner.text.files import EXPECTED, TextFile, open_text
from vllm_moeq.format import UsageError

MAX_LINE = 1 << 24
"""Characters of one line of JSON."""

MAX_ARRAY = 1 << 26
"""Bytes of a JSON array, which is read at once; JSON lines may be longer."""

JSON_NAMES = (".json", ".jsonl", ".ndjson")

FIELD = re.compile(rf'[{{,]\s*"({"|".join(FIELDS)})"\s*:')
"""A field that makes a document, somewhere in JSON."""

DECODER = json.JSONDecoder()


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
        UsageError: no such file, or its contents are damaged; the message names file and line.
    """
    with open_text(path) as file:
        found = next(it for it in FORMATS if it.fits(file))
        yield from found.read(file, characters)


def _text_of(file: TextFile) -> str:
    """Return the head as text, without a byte order mark; what is no text becomes replacement characters."""
    return file.head.decode("utf-8-sig", errors="replace")


def _as_text(file: TextFile, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file.stream, encoding="utf-8-sig", newline=newline)


def _parsed(text: str) -> Any:
    """Return a JSON value, or None if the text is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_row(text: str, complete: bool) -> bool:
    """Tell whether JSON is an object that makes a document; the end of a long one may be cut off."""
    found = _parsed(text) if complete else None
    if complete:
        return isinstance(found, dict) and any(field in found for field in FIELDS)
    return text.startswith('{"') and FIELD.search(text) is not None


def _fits_array(file: TextFile) -> bool:
    text = _text_of(file).lstrip()
    if not text.startswith("["):
        return False
    if file.named(*JSON_NAMES):
        return not file.named(*JSON_NAMES[1:])
    try:
        first, _ = DECODER.raw_decode(text, _skip(text, 1))
    except (ValueError, RecursionError):
        return re.match(r'\[\s*\{\s*"', text) is not None and not file.whole and FIELD.search(text) is not None
    if isinstance(first, str):
        whole = _parsed(text) if file.whole else [first]
        return isinstance(whole, list) and all(isinstance(item, str) for item in whole)
    return isinstance(first, dict) and any(field in first for field in FIELDS)


def _read_array(file: TextFile, _: int) -> Iterator[Document]:
    data = file.stream.read(MAX_ARRAY + 1)
    if len(data) > MAX_ARRAY:
        raise UsageError(
            f"{file.path}: expected a JSON array of at most {MAX_ARRAY >> 20} MiB; JSON lines may be longer"
        )
    text = data.decode("utf-8-sig")
    place, count = _skip(text, text.index("[") + 1), 0
    while text[place : place + 1] != "]":
        where = f"{file.path}: line {text.count(chr(10), 0, place) + 1}"
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: expected an array of JSON objects, found no JSON") from None
        count += 1
        yield document_of(value, f"{where}, item {count}")
        place = _skip(text, end)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            raise UsageError(f"{where}: expected a comma or the end of the array behind item {count}")


def _skip(text: str, place: int) -> int:
    """Return the place of the next character that is no white space."""
    while text[place : place + 1].isspace():
        place += 1
    return place


def _fits_lines(file: TextFile) -> bool:
    if file.named(*JSON_NAMES):
        return True
    text = _text_of(file).lstrip()
    first, newline, rest = text.partition("\n")
    if text.startswith('"'):
        return all(isinstance(_parsed(line), str) for line in text.splitlines()[:2] if newline or file.whole)
    if not text.startswith("{"):
        return False
    if _is_row(first.rstrip(), complete=bool(newline) or file.whole):
        return True
    second = rest.lstrip().partition("\n")[0]
    return isinstance(_parsed(first), dict) and isinstance(_parsed(second), dict)


def _read_lines(file: TextFile, _: int) -> Iterator[Document]:
    text, number = _as_text(file), 0
    while line := text.readline(MAX_LINE + 1):
        number += 1
        where = f"{file.path}: line {number}"
        if len(line) > MAX_LINE:
            raise UsageError(f"{where}: expected at most {MAX_LINE} characters in a line of JSON")
        if not line.strip():
            continue
        value = _parsed(line)
        if value is None and line.strip() != "null":
            raise UsageError(f"{where}: expected a JSON object with a field {FIELDS[0]} in one line, found no JSON")
        yield document_of(value, where)


def _read_plain(file: TextFile, characters: int) -> Iterator[Document]:
    if b"\0" in file.head:
        raise UsageError(f"{file.path}: {EXPECTED}, found binary data")
    yield Document(str(file.path), _as_text(file).read(characters))


FORMATS = (
    TextFormat(tables.is_parquet, tables.read_parquet),
    TextFormat(_fits_array, _read_array),
    TextFormat(_fits_lines, _read_lines),
    TextFormat(tables.is_csv, tables.read_csv),
    TextFormat(lambda _: True, _read_plain),
)
"""In the order in which they are tried; the last one takes everything. A new format is a row."""

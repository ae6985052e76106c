"""JSON: an object a line, or values that take several lines; arrays are read as the documents in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.text.documents import FIELDS, Document, document_of
from planner.text.files import MAX_BLANK, TextFile
from vllm_moeq.format import UsageError

MAX_LINE = 1 << 24
"""Bytes of one line of JSON."""

MAX_VALUES = 1 << 26
"""Bytes of JSON whose values take several lines, which are read at once; JSON lines may be longer."""

JSON_NAMES = (".json", ".jsonl", ".ndjson")

FIELD = re.compile(rf'[{{,]\s*"({"|".join(FIELDS)})"\s*:')
"""A field that makes a document, somewhere in JSON."""

SPACES = " \t\r\n"
"""What may stand between the values of JSON."""

BLANKS = re.compile(f"[{SPACES}]*")

MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark."""

SHOWN = 40
"""Characters of what is no JSON in a message."""

CUT = 10
"""A value that was cut off fails within so many characters of the end; ``-Infinity`` has nine."""

NO_JSON, CUT_OFF = object(), object()
"""What is no value of JSON, and what may be the beginning of one; ``None`` is a value, null."""

DECODER = json.JSONDecoder()


def is_json(file: TextFile) -> bool:
    """Tell whether a file is JSON: its name says so, or it begins with a document in JSON."""
    if file.named(*JSON_NAMES):
        return True
    text = file.head.decode("utf-8-sig", errors="replace").lstrip(SPACES)
    first, newline, rest = text.partition("\n")
    if text.startswith("["):
        return _begins_array(text, file.whole)
    if text.startswith('"'):
        lines = text.split("\n", 2)[:2] if newline or file.whole else []
        return all(isinstance(_alone(line), str) for line in lines if line)
    if not text.startswith("{"):
        return False
    second = rest.lstrip().partition("\n")[0]
    return _begins_document(text, 0, file.whole) or all(isinstance(_alone(line), dict) for line in (first, second))


def _begins_array(text: str, whole: bool) -> bool:
    """Tell whether a text begins with an array of documents; of one of strings nothing else may follow."""
    place = _skip(text, 1)
    if not text.startswith('"', place):
        return _begins_document(text, place, whole)
    first, end = _decoded(text, place)
    if not whole:
        return isinstance(first, str) or first is CUT_OFF
    place, value = 0, None
    while place < len(text):
        value, end = _decoded(text, place)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return False
        place = _skip(text, end)
    return True


def _begins_document(text: str, place: int, whole: bool) -> bool:
    """Tell whether an object that makes a document begins at a place; the end of a long one may be cut off."""
    value, _ = _decoded(text, place)
    if value is CUT_OFF:
        return not whole and text.startswith("{", place) and FIELD.search(text, place) is not None
    return isinstance(value, dict) and any(field in value for field in FIELDS)


def read_json_documents(file: TextFile, _: int) -> Iterator[Document]:
    """Yield the documents of a file: its lines one by one, or where a value takes several lines, of the whole file.

    Raises:
        UsageError: no JSON, other values than documents, or too many bytes; the message names the line.
    """
    number, line = _next_line(file, 0)
    text = line.decode(errors="replace").strip(SPACES)
    value, end = _decoded(text)
    if line and (value is NO_JSON or (value is CUT_OFF and not text.startswith(("[", "{")))):
        raise UsageError(_no_json(f"{file.path}: line {number}", text[end:]))
    if value is CUT_OFF or isinstance(value, list) or end < len(text):
        yield from _read_whole(file, number, line)
        return
    while line:
        where = f"{file.path}: line {number}"
        if len(line) > MAX_LINE:
            raise UsageError(f"{where}: expected at most {MAX_LINE} bytes in a line of JSON")
        text = line.decode().strip(SPACES)
        value = _alone(text)
        if value is NO_JSON:
            raise UsageError(_no_json(where, text))
        yield document_of(value, where)
        number, line = _next_line(file, number)


def _next_line(file: TextFile, number: int) -> tuple[int, bytes]:
    """Return number and bytes of the next line that is not blank, without a byte order mark; no bytes at the end."""
    first = number
    while line := file.stream.readline(MAX_LINE + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(MARK)
        if line.strip(SPACES.encode()):
            break
        if number - first > MAX_BLANK:
            raise UsageError(f"{file.path}: line {number}: expected JSON, found {MAX_BLANK} empty lines")
    return number, line


def _read_whole(file: TextFile, number: int, line: bytes) -> Iterator[Document]:
    """Yield the documents from a line on."""
    data = line + file.stream.read(max(0, MAX_VALUES + 1 - len(line)))
    if len(data) > MAX_VALUES:
        raise UsageError(
            f"{file.path}: expected at most {MAX_VALUES >> 20} MiB of JSON whose values take several lines, "
            "found more; JSON lines may be longer"
        )
    values = _Values(file.path, data.decode(), number)
    while first := values.next():
        if first == "[":
            yield from _items(values)
        else:
            where = values.where()
            yield document_of(values.take(), where)


def _items(values: _Values) -> Iterator[Document]:
    """Yield the documents of an array, and go behind it."""
    values.place += 1
    count = 0
    if values.next() == "]":
        values.place += 1
        return
    while True:
        where, value, count = values.where(), values.take(), count + 1
        yield document_of(value, f"{where}, item {count}")
        behind = values.next()
        if behind not in (",", "]"):
            expected = f"expected a comma or the end of the array behind item {count}"
            raise UsageError(f"{values.where()}: {expected}, found {values.shown()}")
        values.place += 1
        if behind == "]":
            return
        values.next()


class _Values:
    """JSON values in a text, one behind the other.

    Attributes:
        place: where the next value, comma or bracket is.
    """

    def __init__(self, path: Path, text: str, line: int) -> None:
        self.path, self.text, self.place = path, text, 0
        self._line, self._counted = line, 0

    def next(self) -> str:
        """Go to the next character that is not blank, and return it; an empty text at the end."""
        self.place = _skip(self.text, self.place)
        return self.text[self.place : self.place + 1]

    def where(self) -> str:
        """Return file and line of the place. No line is counted twice: a file may have millions."""
        self._line += self.text.count("\n", self._counted, self.place)
        self._counted = self.place
        return f"{self.path}: line {self._line}"

    def shown(self) -> str:
        """Return the text at the place, for messages."""
        return _shown(self.text[self.place : self.place + SHOWN])

    def take(self) -> Any:
        """Return the value at the place, and go behind it.

        Raises:
            UsageError: there is none; the message names the line in which it fails.
        """
        value, self.place = _decoded(self.text, self.place)
        if value is NO_JSON or value is CUT_OFF:
            raise UsageError(_no_json(self.where(), self.text[self.place : self.place + SHOWN]))
        return value


def _decoded(text: str, place: int = 0) -> tuple[Any, int]:
    """Return the value at a place and where it ends; or :data:`NO_JSON` or :data:`CUT_OFF` and where it fails."""
    try:
        return DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - CUT
        return CUT_OFF if cut else NO_JSON, error.pos
    except (ValueError, RecursionError):
        return NO_JSON, place


def _alone(line: str) -> Any:
    """Return the only value of a line, or :data:`NO_JSON`."""
    line = line.strip(SPACES)
    value, end = _decoded(line)
    return NO_JSON if value is CUT_OFF or end < len(line) else value


def _skip(text: str, place: int) -> int:
    """Return the place of the next character that is not blank."""
    found = BLANKS.match(text, place)
    return place if found is None else found.end()


def _no_json(where: str, found: str) -> str:
    return f"{where}: expected a JSON object with a field {FIELDS[0]}, found no JSON: {_shown(found)}"


def _shown(text: str) -> str:
    return repr(text[:SHOWN]) if text else "the file's end"

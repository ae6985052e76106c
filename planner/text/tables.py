"""Texts in tables: CSV by Python's reader, parquet by pyarrow, which the package datasets brings."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from planner.common.install import require
from planner.text.documents import CHATS, FIELDS, Document, document_of
from planner.text.files import MAX_BLANK, TextFile
from vllm_moeq.format import UsageError

PARQUET = b"PAR1"
CSV_NAMES = (".csv", ".tsv")
MAX_FIELD = 1 << 24
"""Characters of one field of CSV."""

MAX_ROW = 1 << 26
"""Bytes of a row of parquet."""

DELIMITERS = ",\t;|"


def is_parquet(file: TextFile) -> bool:
    """Tell whether a file is parquet."""
    return file.head.startswith(PARQUET)


def read_parquet(file: TextFile, _: int) -> Iterator[Document]:
    """Yield a document per row.

    Raises:
        UsageError: pyarrow is missing, a damaged file, or no column of texts or conversations.
    """
    require(str(file.path), ("pyarrow",), "calibrate")
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file.stream)
        column = _column(table.schema_arrow.names, file)
        # A row at a time: many rows may be one long text that the file has once.
        for row, batch in enumerate(table.iter_batches(batch_size=1, columns=[column]), 1):
            if batch.nbytes > MAX_ROW:
                raise UsageError(f"{file.path}: row {row}: expected at most {MAX_ROW} bytes, found {batch.nbytes}")
            yield document_of({column: batch.column(0)[0].as_py()}, f"{file.path}: row {row}")
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"{file.path}: expected a parquet file, found a damaged one ({error!s:.200})") from None


def is_csv(file: TextFile) -> bool:
    """Tell whether a file is CSV: its name says so, or a header of several columns with one of texts, and a row."""
    if file.named(*CSV_NAMES):
        return True
    text = file.head.decode("utf-8-sig", errors="replace")
    first = io.StringIO(text, newline="").readline()
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(first))
        header, row, more = (next(rows, []) for _ in range(3))
    except csv.Error:
        return False
    complete = len(row) == len(header) or bool(row and not more and not file.whole)  # a long text may be cut off
    return complete and len(header) > 1 and any(field in header for field in FIELDS)


def read_csv(file: TextFile, _: int) -> Iterator[Document]:
    """Yield a document per row.

    Raises:
        UsageError: damaged rows, or no column ``text``.
    """
    csv.field_size_limit(MAX_FIELD)
    text = io.TextIOWrapper(file.stream, encoding="utf-8-sig", newline="")
    header = text.readline(MAX_FIELD)
    reader = csv.reader(_lines(text, file), delimiter=_delimiter(header), strict=True)
    try:
        names = next(csv.reader([header], delimiter=_delimiter(header)), [])
        column = names.index(_column([name for name in names if name not in CHATS], file))
        for row in reader:
            where = f"{file.path}: line {reader.line_num + 1}"
            if row and len(row) <= column:
                raise UsageError(f"{where}: expected {len(names)} columns, found {len(row)}")
            if row:
                yield document_of(row[column], where)
    except csv.Error as error:
        raise UsageError(f"{file.path}: line {reader.line_num + 1}: expected CSV ({error})") from None


def _lines(text: io.TextIOWrapper, file: TextFile) -> Iterator[str]:
    """Yield the lines behind the header; one line of a field without end must not fill the memory.

    Raises:
        UsageError: a line is too long, or too many follow each other without a letter.
    """
    blank, number = 0, 1
    while line := text.readline(MAX_FIELD + 1):
        number += 1
        if len(line) > MAX_FIELD:
            raise UsageError(f"{file.path}: line {number}: expected at most {MAX_FIELD} characters in a line of CSV")
        blank = 0 if line.strip() else blank + 1
        if blank > MAX_BLANK:
            raise UsageError(f"{file.path}: line {number}: expected a row, found {MAX_BLANK} empty lines")
        yield line


def _delimiter(header: str) -> str:
    """Return the delimiter that makes one of the header's fields the column of texts, else a comma."""
    for delimiter in DELIMITERS:
        fields = next(csv.reader([header], delimiter=delimiter), [])
        if any(field in fields for field in FIELDS) and len(fields) > 1:
            return delimiter
    return DELIMITERS[0]


def _column(names: Sequence[str], file: TextFile) -> str:
    """Return the column that makes documents."""
    for field in FIELDS:
        if field in names:
            return field
    raise UsageError(f"{file.path}: expected a column {' or '.join(FIELDS)}, found {list(names)!r:.200}")

"""The same documents from every kind of file, whatever its name; or one line that says what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.text.documents import document_of
from planner.text.formats import read_documents
from vllm_moeq.format import UsageError

TEXTS = ["def f(x):\n    return x\n", 'a "quoted", comma; and ümlaut', "third"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LINE = "a line\n"
LONG = json.dumps({"url": "x", "text": "word " * 40_000}).encode() + b"\n"


def read(path: Path, characters: int = 1 << 20) -> list[str | None]:
    return [document.text for document in read_documents(path, characters)]


def parquet() -> bytes:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    buffer = io.BytesIO()
    files.write_table(arrow.table({"id": [1, 2, 3], "text": TEXTS}), buffer)
    return buffer.getvalue()


def csv_file(delimiter: str = ",") -> bytes:
    rows = [["id", "text"], *([str(number), text] for number, text in enumerate(TEXTS))]
    quoted = (delimiter.join('"' + field.replace('"', '""') + '"' for field in row) for row in rows[1:])
    return "\n".join([delimiter.join(rows[0]), *quoted, ""]).encode()


SAME: dict[str, bytes | Callable[[], bytes]] = {
    "lines.jsonl": LINES,
    "LINES.JSONL": LINES,
    "lines.txt": LINES,
    "lines": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n\n"),
    "packed.jsonl.gz": gzip.compress(LINES),
    "packed.txt": gzip.compress(b"\xef\xbb\xbf" + LINES),
    "lines.json": LINES,
    "array.json": json.dumps(ROWS).encode(),
    "array.JSON": json.dumps(ROWS, indent=1).encode(),
    "array.txt": json.dumps(ROWS, indent=4).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "array.ndjson": json.dumps(ROWS, indent=2).encode(),
    "arrays.json": b"".join(json.dumps([row]).encode() + b"\n" for row in ROWS) + b"[ ]\n",
    "arrays.txt": b"\n\n" + b" ".join(json.dumps([row], indent=1).encode() for row in ROWS),
    "objects.json": b"".join(json.dumps(row, indent=2).encode() + b"\n" for row in ROWS),
    "objects.jsonl": b"\n" + b"".join(json.dumps(row, indent=2).encode() + b"\n" for row in ROWS),
    "objects": b"".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "objects in a line.jsonl": b" ".join(json.dumps(row).encode() for row in ROWS),
    "arrays of strings": b"\n".join(json.dumps([text]).encode() for text in TEXTS),
    "strings.json": json.dumps(TEXTS).encode(),
    "strings.txt": json.dumps(TEXTS).encode(),
    "string lines.txt": "".join(json.dumps(text) + "\n" for text in TEXTS).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "table.csv": csv_file(),
    "TABLE.CSV.gz": gzip.compress(csv_file()),
    "table.txt": csv_file(),
    "table.tsv": csv_file("\t"),
    "table of texts": b"text,id\r\n" + b"".join(b'"%s",1\r\n' % text.replace('"', '""').encode() for text in TEXTS),
    "table of a Mac": b"id,text\r" + b"".join(b'1,"%s"\r' % text.replace('"', '""').encode() for text in TEXTS),
    "table.parquet": parquet,
    "table": parquet,
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_documents(name: str, tmp_path: Path) -> None:
    content = SAME[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content())
    assert read(path) == TEXTS


@pytest.mark.parametrize("name", ["object.json", "object.jsonl", "object.txt", "object"])
@pytest.mark.parametrize("text", ["a text", "line\n" * 40_000])
def test_an_object_of_several_lines_is_one_document(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"id": 1, "text": text}, indent=2))
    assert read(tmp_path / name) == [text]


LARGE: dict[str, Callable[[], str]] = {
    "items": lambda: json.dumps([{"text": "word " * 120}] * 12_000, indent=2),
    "objects": lambda: (json.dumps({"text": "word " * 120}, indent=2) + "\n") * 12_000,
    "blanks": lambda: "[" + " " * (32 << 20) + "]",
    "blank lines": lambda: "\n" * 1_000_000,
}


@pytest.mark.parametrize("name", LARGE)
def test_many_values_take_time_in_proportion(name: str, tmp_path: Path) -> None:
    """A tenth of the limit is plenty; what counts a file's lines anew for every value takes several times as long."""
    path = tmp_path / "large.json"
    path.write_text(LARGE[name]())
    began = time.process_time()
    assert len(read(path)) == (0 if "blank" in name else 12_000)
    assert time.process_time() - began < 5


PLAIN = {
    "a note in brackets.txt": "[see below] and { braces }\nmore\n",
    "python.txt": "{'a': 1}\n[{'b': 2}]\n",
    "list.txt": "[1, 2, 3]\n",
    "numbers.md": '{"a": 1}\nno JSON\n',
    "quoted.txt": '"one" said he\nand "two"\n',
    "names.py": '["a", "b"]\nprint()\n',
    "commas.txt": "one, two\nthree, four, five\n",
    "code.py": '{"a": 1,\n "b": 2}\n',
    "list of lists.txt": '["a"]\n[1]\n',
    "unfinished.py": '{\n "text": f(x),\n}\n' + "more\n" * 20_000,
    "quotes": '"text", "said" he,\n"and more\n',
    "text": "text\nmore text\n",
    "empty": "",
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_text_stays_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(PLAIN[name])
    assert read(tmp_path / name) == [PLAIN[name]]


def test_of_a_plain_text_the_beginning_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo" + b"x" * 300_000)
    assert read(tmp_path / "a.txt", 7) == ["one\ntwo"]


@pytest.mark.parametrize("name", ["long.txt", "long"])
def test_rows_longer_than_what_is_looked_at_are_recognised(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(LONG * 2)
    assert read(tmp_path / name) == ["word " * 40_000] * 2
    (tmp_path / name).write_bytes(b"[" + LONG.strip() + b"," + LONG + b"]")
    assert read(tmp_path / name) == ["word " * 40_000] * 2


@pytest.mark.parametrize("columns", ["text,id", "id,text"])
def test_a_table_of_long_texts_is_recognised(columns: str, tmp_path: Path) -> None:
    rows = [",".join(f'"{LINE * 20_000}"' if name == "text" else "1" for name in columns.split(","))] * 2
    (tmp_path / "long").write_text("\n".join([columns, *rows]))
    assert read(tmp_path / "long") == [LINE * 20_000] * 2


@pytest.mark.parametrize("kind", ["lines", "table"])
def test_only_line_feeds_end_lines(kind: str, tmp_path: Path) -> None:
    text = "one\N{LINE SEPARATOR}two\N{NEXT LINE}\x0cthree"
    content = {"lines": json.dumps(text, ensure_ascii=False) + "\n", "table": f"text,id\n{text},1\n"}
    (tmp_path / kind).write_text(content[kind])
    assert read(tmp_path / kind) == [text]


def test_conversations(tmp_path: Path) -> None:
    openai = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, openai["messages"][1]]}
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (openai, shared, parts)))
    found = [document.messages for document in read_documents(path, 100)]
    assert found == [tuple(openai["messages"])] * 3


REFUSED: dict[str, tuple[bytes, str]] = {
    "broken.jsonl": (
        b'{"text": "fine"}\nnot json\n',
        "line 2: expected a JSON object with a field text, found no JSON: 'not json'",
    ),
    "fields.jsonl": (b'{"content": "x"}\n', "line 1: expected a field text, or messages .* found the fields ..content"),
    "fields.txt": (b'{"content": "x"}\n{"content": "y"}\n', "line 1: expected a field text"),
    "null.jsonl": (b"null\n", "line 1: expected an object with a field text .* found None"),
    "without.jsonl": (b'{"text": null}\n', "line 1: expected a field text, .* found text: None"),
    "deep.jsonl": (b"[" * 100_000, "line 1: .*found no JSON"),
    "number.jsonl": (b"3\n", "line 1: expected an object with a field text"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "half \\ud83d"}\n', r"line 2: .* half of a surrogate pair, \\ud83d"),
    "half.json": (b'[{"text":\n "half \\udc00"}]', r"line 1, item 1: .* half of a surrogate pair, \\udc00"),
    "half-chat.jsonl": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    "roles.jsonl": (b'{"messages": [{"content": "x"}]}', "line 1: expected messages with role and content"),
    "first.jsonl": (
        b"a line that is longer than what is shown of it\n",
        "line 1: expected a JSON object with a field text, found no JSON: 'a line that is longer than what is shown'$",
    ),
    "first-of-many.jsonl": (b"no JSON\n" + b'{"text": "fine"}\n' * (1 << 22), "line 1: .*found no JSON: 'no JSON'"),
    "object.json": (b'\n{\n "text": "x",\n}', "line 4: expected a JSON object .* found no JSON: '}'"),
    "object.txt": (b'{\n "text": "x"\n}\n{\n "txt": "x"\n}', "line 4: expected a field text"),
    "object-and-more": (b'{\n "text": "x"\n}\n prose', "line 4: .* found no JSON: 'prose'"),
    "cut-object.json": (b'{\n "text": "x"\n', "line 3: .* found no JSON: the file's end"),
    "comma.json": (
        b'[{"text": "a"}\n{"text": "b"}]',
        'line 2: expected a comma or the end of the array behind item 1, found \'{"text": "b"}]\'',
    ),
    "cut.json": (b'[{"text": "a"},', "line 1: .* found no JSON: the file's end"),
    "cut-array.json": (b'[{"text": "a"}\n', "line 2: expected a comma or the end .*, found the file's end"),
    "last-comma.json": (b'[{"text": "a"},]', "line 1: .* found no JSON: ']'"),
    "behind.json": (b'[{"text": "a"}]\nthis is no JSON {{{', "line 2: .* found no JSON: 'this is no JSON {{{'"),
    "behind": (b'[{"text": "a"}] [{"txt": "b"}]', "line 1, item 1: expected a field text"),
    "empty-line.jsonl": ("\N{IDEOGRAPHIC SPACE}\n".encode(), "line 1: .* found no JSON: "),
    "large.json": (b"[" + b" " * (1 << 26), "expected at most 64 MiB of JSON whose values take several lines"),
    "long-line.jsonl": (LINES + b'{"text": "' + b"x" * (1 << 24) + b'"}', "line 4: expected at most 16777216 bytes"),
    "utf16.txt": ("text".encode("utf-16"), "found UTF-16"),
    "latin1.txt": (b"caf\xe9 au lait", "found no UTF-8"),
    "latin1.jsonl": (b'{"text": "caf\xe9"}', "found no UTF-8"),
    "zero.txt": (b"a\0b", "found binary data"),
    "archive.zip": (b"PK\x03\x04....", "found a zip archive"),
    "lines.zst": (b"\x28\xb5\x2f\xfd....", "packed by zstd"),
    "damaged.gz": (b"\x1f\x8b" + b"x" * 100, "found damaged gzip data"),
    "cut.gz": (gzip.compress(b"text" * 1000)[:-12], "found damaged gzip data"),
    "table.csv": (b"a,b\n1,2\n", "expected a column text or .*, found ..a., .b."),
    "short.csv": (b"id,text\n1,x\n2\n", "line 3: expected 2 columns, found 1"),
    "cut.csv": (b'id,text\n1,"a\n', "line 2: expected CSV"),
    "empty.csv": (b"", "expected a column text"),
    "blank.jsonl.gz": (
        gzip.compress(LINES + b"\n" * (2 << 20)),
        "line 104.*: expected JSON, found 1048576 empty lines",
    ),
    "empty.jsonl.gz": (
        gzip.compress(LINES + b'{"text":""}\n' * 200_000),
        "line 13.*: expected a text, found 131072 empty ones",
    ),
    "empty.csv.gz": (
        gzip.compress(b"text,x\nhello,1\n" + b",\n" * 200_000),
        "line 13.*: expected a text, found 131072 empty ones",
    ),
    "blank.csv.gz": (
        gzip.compress(b"id,text\n1,x\n" + b"\r\n" * (2 << 20)),
        "line 104.*: expected a row, found 1048576 empty lines",
    ),
    "line.csv": (
        b"text,id\nx,1\n" + b"a," * (1 << 24),
        "line 3: expected at most 16777216 characters in a line of CSV",
    ),
    "damaged.parquet": (b"PAR1" + b"x" * 100, "expected a parquet file, found a damaged one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_file_and_the_line(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{name}: {message}|{name}: .*{message}") as error:
        read(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_one_long_text_in_many_rows_of_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    path = tmp_path / "bomb.parquet"
    once = arrow.DictionaryArray.from_arrays(arrow.array([0] * 40, arrow.int32()), arrow.array(["x" * (65 << 20)]))
    files.write_table(arrow.table({"text": once}), path)
    assert path.stat().st_size < 1 << 22
    with pytest.raises(UsageError, match=r"row 1: expected at most 67108864 bytes, found 68157"):
        read(path, 1 << 30)


class TestWhatIsNoFile:
    def test_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UsageError, match=r"pipe: .*found a pipe or a device"):
            read(tmp_path / "pipe")

    def test_device(self, tmp_path: Path) -> None:
        (tmp_path / "endless").symlink_to("/dev/zero")
        with pytest.raises(UsageError, match=r"endless: .*found a pipe or a device"):
            read(tmp_path / "endless")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="found a folder"):
            read(tmp_path)

    def test_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"nothing: .*No such file"):
            read(tmp_path / "nothing")

    def test_sparse_table(self, tmp_path: Path) -> None:
        (tmp_path / "sparse.csv").write_bytes(b"text,x\nhello,1\n")
        os.truncate(tmp_path / "sparse.csv", 1 << 40)
        with pytest.raises(UsageError, match="line 3: expected at most 16777216 characters"):
            read(tmp_path / "sparse.csv")

    def test_sparse(self, tmp_path: Path) -> None:
        with (tmp_path / "sparse").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(UsageError, match="found binary data"):
            read(tmp_path / "sparse")


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"a\.parquet: expected the package pyarrow, .*pip install '\.\[calibrate\]'"):
        read(tmp_path / "a.parquet")


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    st.booleans(),
    st.sampled_from([None, 0, 1, "\t"]),
)
def test_any_texts_come_back_from_json(texts: list[str], array: bool, indent: int | str | None) -> None:
    rows = [{"text": text} for text in texts]
    values = [rows] if array else rows
    content = "".join(json.dumps(value, ensure_ascii=False, indent=indent) + "\n" for value in values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts"
        path.write_text(content, encoding="utf-8", newline="")
        assert read(path) == texts


@pytest.mark.parametrize("row", [None, 3, [], {}, {"text": 3}, {"messages": "x"}])
def test_rows_that_are_no_documents(row: object) -> None:
    with pytest.raises(UsageError, match=r"^here: expected "):
        document_of(row, "here")

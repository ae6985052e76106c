"""README.md and JSON files of a stranger's folder: ``moeq report`` reads them within bounds, or refuses in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.test_corpus import bounded
from tests.conftest import one_line

Moeq = Callable[..., Any]

pytestmark = pytest.mark.slow


def as_folder(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(6 << 30)


CARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "found a pipe or a device"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "found a pipe or a device"),
    "sparse": (sparse, "expected at most 4194304 bytes"),
    "a folder": (as_folder, "found a folder"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_is_no_file(name: str, quantized_copy: Path, moeq: Moeq) -> None:
    make, words = CARDS[name]
    (quantized_copy / "README.md").unlink()
    make(quantized_copy / "README.md")
    with bounded():
        message = one_line(moeq("report", quantized_copy, "--no-png"))
    assert "README.md: expected" in message
    assert words in message


BEGIN, END = b"<!-- evaluation -->", b"<!-- end of evaluation -->"
TEXTS: dict[str, bytes] = {
    "many beginnings": BEGIN * 20_000,
    "many ends": END * 20_000 + BEGIN * 20_000,
    "one section among many": BEGIN * 20_000 + END,
    "no UTF-8": b"\xff\xfe" * 1000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_card_with_odd_contents(name: str, quantized_copy: Path, moeq: Moeq) -> None:
    content = TEXTS[name]
    (quantized_copy / "README.md").write_bytes(content)
    with bounded():
        outcome = moeq("report", quantized_copy, "--no-png")
    assert outcome.code == 0, outcome.err
    if END not in content.partition(BEGIN)[2]:
        assert (quantized_copy / "README.md").read_bytes() == content


DIGITS = "9" * 400
NUMBERS: dict[str, str] = {
    "evaluation.json": f'{{"version": 1, "texts": [], "tasks": [], "more": {DIGITS}}}',
    "quantization_report.json": '{"layers": [{"prefix": "a", "experts": [{"expert": 0, "relative_error": '
    f"{DIGITS}}}]}}]}}",
    "plan.json": f'{{"version": 1, "avg_bits": {DIGITS}}}',
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("number", [DIGITS, "1e999", "-1e999", "NaN", "9" * 10_000])
def test_numbers_without_end(name: str, number: str, quantized_copy: Path, moeq: Moeq) -> None:
    (quantized_copy / name).write_text(NUMBERS[name].replace(DIGITS, number))
    with bounded():
        outcome = moeq("report", quantized_copy, "--no-png")
    assert outcome.code in (0, 2), outcome.err
    if outcome.code == 2:
        assert name in one_line(outcome)
    page = quantized_copy / "report.html"
    assert not page.exists() or DIGITS not in page.read_text()


@pytest.mark.parametrize("name", ["evaluation.json", "quantization_report.json", "plan.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_files_that_are_no_objects(name: str, content: bytes, quantized_copy: Path, moeq: Moeq) -> None:
    (quantized_copy / name).write_bytes(content)
    with bounded():
        outcome = moeq("report", quantized_copy, "--no-png")
    assert name in one_line(outcome)
    assert json.loads((quantized_copy / "config.json").read_text())

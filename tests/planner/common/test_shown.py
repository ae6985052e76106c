"""Names from files and command lines: no markup, no escapes, nothing endless, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from planner.common.progress import Progress
from planner.common.shown import LONGEST, add_row, say, shown
from tests.conftest import one_line

Moeq = Callable[..., Any]

NAMES = ("m[old]x", "n[/red]x", "m\x1b[31mx", "m\u202ex", "m\x07x", ":smile:", "a\nb", "x\udcff")


@given(st.text())
def test_any_text_is_printable_and_bounded(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text, 20)) <= 20


@pytest.mark.parametrize("text", ["model", "Mixtral-8x7B", "größe", "漢字", "a [b] c", "50 %"])
def test_ordinary_texts_stay(text: str) -> None:
    assert shown(text) == text


def test_the_middle_of_a_long_text_is_left_out() -> None:
    assert shown("a" + "b" * 5_000_000 + "c").startswith("abb")
    assert shown("a" + "b" * 5_000_000 + "c").endswith("bbc")
    assert len(shown("x" * 5_000_000)) <= LONGEST


@pytest.mark.parametrize("name", NAMES)
def test_lines_and_cells_are_literal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"folder {name}")
    Progress().line(f"folder {name}")
    table = Table("name")
    add_row(table, name)
    Console(width=80).print(table)
    found = capsys.readouterr()
    assert (found.out + found.err).count(shown(name)) == 3
    assert not {"\x1b", "\x07", "\u202e"} & set(found.out + found.err)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:4])
def test_a_folder_of_that_name_is_verified_and_reported(
    name: str, moeq: Moeq, quantized_mixtral: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(quantized_mixtral, folder)
    for command in (("verify", folder), ("report", folder, "--no-png"), ("push", folder, "me/x", "--dry-run")):
        outcome = moeq(*command)
        assert outcome.code == 0, outcome.err
        assert "\x1b" not in outcome.out + outcome.err
    assert shown(folder) in moeq("verify", folder).out.replace("\n", "")


@pytest.mark.parametrize("command", ["inspect", "verify", "report", "eval", "quantize", "serve"])
@pytest.mark.parametrize("length", [300, 5000])
def test_names_that_the_file_system_does_not_have(command: str, length: int, moeq: Moeq, tmp_path: Path) -> None:
    own = {"eval": ("--data", "text"), "quantize": ("-o", tmp_path / "out")}
    message = one_line(moeq(command, "n" * length, *own.get(command, ())))
    assert "nnn" in message
    assert len(message) < 2 * LONGEST


@pytest.mark.slow
def test_an_output_name_that_is_too_long(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    flags = ("--avg-bits", 3, "--quantizer", "rtn", "--group-size", 32)
    assert "File name too long" in one_line(moeq("quantize", tiny_mixtral, *flags, "-o", tmp_path / ("n" * 300)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_override_of_five_million_letters(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "overrides.json").write_text(json.dumps({"x" * 5_000_000: 3}))
    message = one_line(moeq("plan", tiny_mixtral, "--overrides", tmp_path / "overrides.json"))
    assert len(message) < 2 * LONGEST


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(moeq: Moeq, quantized_copy: Path) -> None:
    quantized_copy.chmod(0)
    try:
        assert "Permission denied" in one_line(moeq("verify", quantized_copy))
    finally:
        quantized_copy.chmod(0o755)

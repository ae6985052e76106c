"""Mistakes with ``moeq report``: one line that names the file, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome, one_line

Moeq = Callable[..., Outcome]


@pytest.fixture
def copy(moeq: Moeq, tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral by the paper's rule."""
    folder = tmp_path_factory.mktemp("refused") / "mixtral"
    assert moeq("quantize", tiny_mixtral, "--group-size", 32, "--quantizer", "rtn", "-o", folder).code == 0
    return folder


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("quantization_report.json", '{"layers": [{"prefix": 3, "experts": []}]}', "layers.0.prefix"),
        ("quantization_report.json", "[", "not valid JSON"),
        ("evaluation.json", '{"texts": [{}]}', "texts.0"),
        ("plan.json", "{}", "expected a plan of version 1"),
    ],
)
def test_damaged_files(moeq: Moeq, copy: Path, file: str, content: str, message: str) -> None:
    (copy / file).write_text(content)
    found = one_line(moeq("report", copy))
    assert f"{copy / file}: " in found
    assert message in found
    assert not (copy / "report.html").exists()


def test_a_plan_of_other_widths(moeq: Moeq, copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    next(iter(plan["experts"].values()))[0] = 2
    (copy / "plan.json").write_text(json.dumps(plan))
    assert "plan.json: expected the widths of config.json, found others" in moeq("report", copy).err


def test_a_source_of_other_layers(moeq: Moeq, copy: Path, tiny_qwen3_moe: Path) -> None:
    (copy / "plan.json").unlink()
    assert f"expected the MoE layers and experts of {copy}" in one_line(moeq("report", copy, "--model", tiny_qwen3_moe))


@pytest.mark.parametrize("command", ["report", "push"])
def test_help_stands_alone(moeq: Moeq, command: str) -> None:
    outcome = moeq(command, "--help")
    assert (outcome.code, f"Example: moeq {command} Mixtral-8x7B-2.5bit" in outcome.out) == (0, True)


def test_a_folder_that_is_no_checkpoint(moeq: Moeq, tmp_path: Path) -> None:
    assert moeq("report", tmp_path / "none").err.startswith(f"error: {tmp_path / 'none'}: expected a checkpoint")


def test_an_output_in_no_folder(moeq: Moeq, copy: Path, tmp_path: Path) -> None:
    message = one_line(moeq("report", copy, "-o", tmp_path / "none" / "page.html"))
    assert f"expected the parent folder {tmp_path / 'none'} to exist" in message

"""Plans, statistics, overrides and texts from strangers: refused in one line that names the file, or harmless."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from planner.calibration.statistics import LayerStatistics, json_path, read_statistics, write_statistics
from planner.model.layout import Layout, read_layout
from planner.model.source import SourceModel
from tests.attacks.damages.attack import ESCAPE
from tests.attacks.damages.configs import nested
from tests.attacks.forge import LAYER, with_header
from tests.attacks.test_corpus import bounded
from vllm_moeq.format import MoeqError

Moeq = Callable[..., Any]
Edit = Callable[[dict[str, Any]], object]

PLANS: dict[str, tuple[Edit, str]] = {
    "unknown key": (lambda it: it.update(code="x"), "code"),
    "path for a prefix": (lambda it: it["experts"].update({"../../x": [1]}), "../../x"),
    "escape for a prefix": (lambda it: it["experts"].update({ESCAPE: [1]}), r"\x1b"),
    "long method": (lambda it: it.update(method="m" * 100_000), "method"),
    "width that is no number": (lambda it: it["experts"].update({LAYER: ["1"] * 8}), f"experts.{LAYER}.0"),
    "many widths": (lambda it: it["experts"].update({LAYER: [1] * 200_000}), LAYER),
    "many layers": (lambda it: it["experts"].update({f"l{i}": [1] for i in range(150_000)}), "experts"),
    "order of others": (lambda it: it.update(order={LAYER: [9999]}), "order"),
    "zeta without end": (lambda it: it.update(settings={"zeta": float("inf")}), "settings.zeta"),
    "nested deeply": (lambda it: it.update(source=nested(300)), "levels"),
    "true for a version": (lambda it: it.update(version=True), "version 1"),
    "escape for a method": (lambda it: it.update(method=ESCAPE), "expected a text that can be printed"),
    "a version without end": (lambda it: it.update(version=10**4000), "version 1"),
    "a seed without end": (lambda it: it.update(settings={"seed": 10**400}), "settings.seed"),
    "a number for a fingerprint": (lambda it: it.update(source={"fingerprint": 1}), "source.fingerprint"),
    "average NaN": (lambda it: it.update(avg_bits=float("nan")), "avg_bits"),
}


def refusal(outcome: Any, path: Path, words: str) -> None:
    assert outcome.code == 2, outcome
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert line.isprintable()
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize("name", PLANS)
def test_plan(name: str, all_widths_plan: Path, tiny_mixtral: Path, tmp_path: Path, moeq: Moeq) -> None:
    edit, words = PLANS[name]
    plan = json.loads(all_widths_plan.read_text())
    edit(plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with bounded():
        outcome = moeq("quantize", tiny_mixtral, "--plan", path, "-o", tmp_path / "out", "--group-size", 32)
    refusal(outcome, path, words)
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"{}," * (1 << 19)])
@pytest.mark.parametrize("flag", ["--plan", "--overrides"])
def test_files_that_are_no_json(flag: str, content: bytes, tiny_mixtral: Path, tmp_path: Path, moeq: Moeq) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with bounded():
        outcome = moeq("quantize", tiny_mixtral, flag, path, "-o", tmp_path / "out", "--group-size", 32)
    refusal(outcome, path, "")


@pytest.fixture
def layout(tiny_mixtral: Path) -> Layout:
    with SourceModel(tiny_mixtral) as model:
        return read_layout(model)


@pytest.fixture
def statistics(layout: Layout, tmp_path: Path) -> Path:
    path = tmp_path / "stats.safetensors"
    layers = {
        it.prefix: LayerStatistics(
            tokens=torch.ones(8, dtype=torch.int64),
            gate_probability=torch.ones(8),
            routing_weight=torch.ones(8),
            input_square=torch.ones(8, 64),
            inner_square=torch.ones(8, 128),
            output_square=torch.ones(8),
        )
        for it in layout.layers
    }
    write_statistics(path, layers, {})
    read_statistics(path, layout)
    return path


def edited(path: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(path)
    del tensors[f"{LAYER}.{name}"]
    if value is not None:
        tensors[f"{LAYER}.{name}"] = value
    save_file(tensors, path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


STATISTICS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: edited(path, "tokens", None), "tokens"),
    "NaN": (lambda path: edited(path, "gate_probability", torch.full((8,), torch.nan)), "gate_probability"),
    "another dtype": (lambda path: edited(path, "tokens", torch.ones(8)), "tokens"),
    "another shape": (lambda path: edited(path, "input_square", torch.ones(8, 65)), "input_square"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "truncated"),
    "no header": (lambda path: path.write_bytes(b""), "truncated"),
    "long header": (lambda path: path.write_bytes(with_header(b"{" + b" " * (25 << 20), path.read_bytes())), "header"),
    "description nested deeply": (lambda path: json_path(path).write_text("[" * 100_000), "levels"),
    "description of another version": (lambda path: json_path(path).write_text('{"version": 2}'), "version 1"),
    "folder": (replace_by_folder, "expected a statistics file"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name: str, statistics: Path, layout: Layout) -> None:
    change, words = STATISTICS[name]
    change(statistics)
    with bounded(), pytest.raises(MoeqError) as error:
        read_statistics(statistics, layout)
    assert str(statistics.with_suffix("")) in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x80" * 1000])
def test_text_that_is_not_utf8(content: bytes, tiny_mixtral: Path, tmp_path: Path, moeq: Moeq) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    outcome = moeq("eval", tiny_mixtral, "--data", path)
    refusal(outcome, path, "UTF-8")

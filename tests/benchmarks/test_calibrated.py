"""The table of quantizers: rows are measured once, GPTQ reads the text, and its error is the least."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.quantizing import calibrated
from tests.paths import MIXTRAL
from vllm_moeq.format import UsageError


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """The shipped Mixtral with a short text."""
    folder = tmp_path / "model"
    shutil.copytree(MIXTRAL, folder, ignore=shutil.ignore_patterns("held_out.txt"))
    text = (MIXTRAL / "held_out.txt").read_text(encoding="utf-8")[:8000]
    (folder / "held_out.txt").write_text(text, encoding="utf-8")
    return folder


def test_rows_are_measured_once_and_calibration_gains(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "WIDTHS", {"uniform 2": calibrated.WIDTHS["uniform 2"]})
    chosen = {name: calibrated.QUANTIZERS[name] for name in ("hqq", "gptq")}
    monkeypatch.setattr(calibrated, "QUANTIZERS", chosen)
    results = tmp_path / "results"
    lines = calibrated.run(short, results, 4, 256)
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" original ", " "],
        [" uniform 2 ", " hqq "],
        [" uniform 2 ", " gptq "],
    ]
    found = {path.stem: json.loads(path.read_text()) for path in results.iterdir()}
    assert found["uniform-2-gptq"]["mean"] < found["uniform-2-hqq"]["mean"]
    results.joinpath("uniform-2-hqq.json").write_text(json.dumps(found["uniform-2-hqq"] | {"mean": 7.0}))
    again = calibrated.run(short, results, 4, 256)
    assert "| 7.0000 |" in again[3]
    assert again[4] == lines[4]


def test_a_model_without_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"held_out\.txt: expected a text, found no such file"):
        calibrated.run(tmp_path, tmp_path / "results", 4, 256)

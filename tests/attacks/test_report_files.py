"""README.md and JSON files of a stranger's folder: ``moeq report`` reads them within bounds, or refuses in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import planner
from planner.evaluation.record import Divergence
from tests.attacks.test_corpus import bounded
from tests.conftest import one_line
from tests.planner.reporting.synthetic import EVALUATIONS

Moeq = Callable[..., Any]

pytestmark = pytest.mark.slow


def as_folder(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(6 << 30)


CARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "found a pipe or a device"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "found a link to /dev/zero"),
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


@pytest.mark.parametrize("name", ["README.md", "evaluation.json", "plan.json", "quantization_report.json"])
def test_a_file_that_is_a_link_out_of_the_folder(name: str, quantized_copy: Path, moeq: Moeq, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("{}" if name.endswith(".json") else f"secret {BEGIN.decode()} {END.decode()}")
    (quantized_copy / name).unlink(missing_ok=True)
    (quantized_copy / name).symlink_to(private)
    before = private.read_bytes()
    message = one_line(moeq("report", quantized_copy, "--no-png"))
    assert f"{name}: expected a file inside the folder" in message
    assert private.read_bytes() == before
    assert (quantized_copy / name).is_symlink()


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


EXPERTS = "model.layers.0.block_sparse_moe.experts"
PLACES: list[tuple[str, tuple[str | int, ...]]] = [
    *(("evaluation.json", ("texts", 0, name)) for name in ("window", "tokens", "perplexity", "perplexity_error")),
    *(("evaluation.json", ("texts", 0, f"reference_perplexity{end}")) for end in ("", "_error")),
    *(("evaluation.json", ("texts", 0, "kl", name)) for name in Divergence.model_fields),
    *(("evaluation.json", ("tasks", 0, name)) for name in ("value", "stderr", "samples", "limit")),
    *(("quantization_report.json", ("source", name)) for name in ("bytes",)),
    *(("quantization_report.json", ("layers", 0, "experts", 0, name)) for name in ("expert", "relative_error")),
    *(("quantization_report.json", ("layers", 0, "experts", 0, name)) for name in ("tokens", "output_error")),
    *(("plan.json", ("scores", EXPERTS, name, 0)) for name in ("router_norm", "max_var")),
    *(("plan.json", (name,)) for name in ("avg_bits", "achieved_avg_bits")),
    *(("plan.json", ("settings", name)) for name in ("zeta", "seed", "budget_gib")),
    ("plan.json", ("cost", "calibration_seconds")),
]
"""Every number of a folder that a report shows, and some that it only reads."""

DIGITS = "9" * 400
NUMBERS = ["5e-324", "-5e-324", "1e-310", "0", "-1", "1.7976931348623157e308", "-1.7976931348623157e308"]
ENDLESS = [DIGITS, f"-{DIGITS}", "9" * 10_000, "1e999", "-1e999", "NaN", "Infinity", "-Infinity"]


@pytest.fixture(scope="module")
def numbered(quantized_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all of the numbers; what a test changes it puts back."""
    folder = Path(shutil.copytree(quantized_mixtral, tmp_path_factory.mktemp("numbers") / "mixtral"))
    EVALUATIONS.write(folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan["scores"] = {
        prefix: {name: [0.25 * (place + 1) for place in range(len(widths))] for name in ("router_norm", "max_var")}
        for prefix, widths in plan["experts"].items()
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def refusal(folder: Path) -> str | None:
    """Return why there is no report; None if there is one."""
    try:
        made = planner.report(folder, png=False)
    except planner.MoeqError as error:
        return str(error)
    json.dumps(made.as_dict(), allow_nan=False)
    return None


@pytest.mark.parametrize(("name", "keys"), PLACES)
def test_extreme_numbers(name: str, keys: tuple[str | int, ...], numbered: Path) -> None:
    """They are shown, or one line names the file; what ``--json`` prints is JSON."""
    content = (numbered / name).read_text()
    for number in NUMBERS + ENDLESS:
        value = place = json.loads(content)
        for key in keys[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[int(key)]
        place[keys[-1]] = "@"
        (numbered / name).write_text(json.dumps(value).replace('"@"', number))
        message = refusal(numbered)
        if message is None:
            assert number in NUMBERS or keys[-1] == "seed", number  # a seed is copied as it is
        else:
            assert name in message
            assert len(message.splitlines()) == 1
    (numbered / name).write_text(content)


@pytest.mark.parametrize("name", ["evaluation.json", "quantization_report.json", "plan.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_files_that_are_no_objects(name: str, content: bytes, quantized_copy: Path, moeq: Moeq) -> None:
    (quantized_copy / name).write_bytes(content)
    with bounded():
        outcome = moeq("report", quantized_copy, "--no-png")
    assert name in one_line(outcome)
    assert json.loads((quantized_copy / "config.json").read_text())

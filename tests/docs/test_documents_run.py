"""What README.md, the guide and the page on the paper tell a reader to type, run as it stands there.

The shipped Mixtral takes the place of every model, under the models' names, and short texts that of the pages' texts.
Flags behind those of the page make a run short: the last one of a flag counts. ``tests/test_readme.py`` runs README's
fenced blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.common.units import GIB
from tests.conftest import Outcome
from tests.docs.documents import ROOT, Command, commands
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.planner.model.test_config_sizes import CONFIGS, write_config

Moeq = Callable[..., Outcome]
Row = tuple[Callable[[Command], bool], str]

NAMES = ("MODEL", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B")
"""Models that the pages name."""

SMALL = ("--samples", "4", "--seq-len", "64")
CHEAP: dict[str, tuple[str, ...]] = {
    "plan": (*SMALL, "--method", "kl-estimated"),
    "quantize": (*SMALL, "--method", "kl-estimated"),
    "calibrate": (*SMALL, "--for", "kl-estimated"),
    "compare": (*SMALL, "--methods", "kl-estimated,uniform", "--avg-bits", "2", "--quantizer", "hqq"),
}
"""Command → flags for a run that reads a text."""

CHECKED_ONLY: tuple[Row, ...] = (
    (lambda found: found.words[0] != "moeq", "test_commands.py looks for it"),
    (lambda found: found.words[1] == "serve", "test_readme.py starts the one server of these tests"),
    (lambda found: found.words[1] == "push", "it uploads; tests/planner/commands/test_push.py has a Hub"),
    (lambda found: "--suite" in found.words or "--tasks" in found.words, "it downloads tasks: test_eval_tasks.py"),
    (lambda found: "gptq" in found.words and found.words[1] == "export", "one bit: tests/planner/exchange"),
    (lambda found: found.words[1] == "import", "it needs that export: tests/planner/exchange"),
)
"""Commands that are not run here, with the reason; ``test_commands.py`` parses all of them."""


def replaced(words: tuple[str, ...], **values: str) -> list[str]:
    """Return the words with other values of some flags."""
    found = list(words)
    for flag, value in values.items():
        if f"--{flag}" in found:
            found += [f"--{flag}", value]
    return found


def short(command: Command) -> list[str]:
    """Return the arguments, with flags behind them that make the run short."""
    _, name, *_ = command.words
    arguments = replaced(command.words[1:], device="cpu")
    if "--data" not in arguments:
        return arguments
    if name == "eval":
        return [*arguments, "--max-tokens", "512"]
    given = [*CHEAP[name]]
    if "--method" in command.words:
        given = given[: given.index("--method")]
    if name == "compare":
        given += ["--max-tokens", "512"]
    return [*arguments, *given, "--data", "text.jsonl"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the pages' commands name."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(MIXTRAL)
    (tmp_path / "text.jsonl").symlink_to(CALIBRATION_TEXT)
    for name in ("text.txt", "test.txt"):
        (tmp_path / name).symlink_to(MIXTRAL / "held_out.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/reproduce.md"])
def test_the_page(moeq: Moeq, desk: Path, page: str) -> None:
    asked = [
        found for found in commands(page) if not found.fenced and not any(holds(found) for holds, _ in CHECKED_ONLY)
    ]
    if not any(found.words[-2:] == ("-o", "DIR") for found in asked):
        assert moeq("quantize", "MODEL", "--quantizer", "rtn", "-o", "DIR").code == 0
    for command in asked:
        outcome = moeq(*short(command))
        assert outcome.code == 0, f"{command}\n{outcome.err}"
    assert len(asked) >= 3
    assert any(desk.glob("*/report.html")) == any(found.words[1] == "report" for found in asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "concurrency", "memory", "gpus"),
    [("8x7b", "Mixtral 8x7B", 4, 24, [2, 1, 1]), ("8x22b", "Mixtral 8x22B", 8, 80, [1, 1, 1])],
)
def test_the_sizes_in_the_guide(
    moeq: Moeq, tmp_path: Path, name: str, model: str, concurrency: int, memory: int, gpus: list[int]
) -> None:
    folder = write_config(tmp_path / name, CONFIGS[name])
    found = []
    for average in ("3", "2.5", "2"):
        flags = ("--avg-bits", average, "--gpu-gib", memory, "--concurrency", concurrency)
        outcome = moeq("plan", folder, "--dry-run", "--json", *flags)
        assert outcome.code == 0, outcome.err
        found.append(json.loads(outcome.out))
    sizes = " | ".join(f"{each['gib']['ours']:.2f}" for each in found)
    row = f"| {model} | {found[0]['gib']['bf16']:.2f} GiB | {sizes} | {memory} GiB: "
    (line,) = (line for line in (ROOT / "docs" / "guide.md").read_text().splitlines() if line.startswith(row))
    assert f"(cache {found[-1]['serving']['cache_bytes'] / GIB:.0f} GiB)" in line
    assert [each["serving"]["gpus"] for each in found] == gpus

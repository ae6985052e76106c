"""Evaluations that are killed: the same numbers, from what was finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures import build
from tests.conftest import Outcome, run_here
from tests.paths import MIXTRAL, MOEQ
from tests.planner.evaluation.test_tasks import accuracies, code_documents, write_task
from tests.shipped import MIXTRAL_SIZES

pytestmark = pytest.mark.slow

READ = ("--data", MIXTRAL / "held_out.txt", "--max-tokens", 2501, "--window", 250)
LAST = f"hidden-{MIXTRAL_SIZES.layers:05d}"
"""The states behind the last layer."""

NUMBERS = ("perplexity", "perplexity_error", "reference_perplexity", "kl")

Moeq = Callable[..., Outcome]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "quantized"
    run_here("quantize", MIXTRAL, "--method", "uniform", "--avg-bits", 2, "--quantizer", "rtn", "-o", folder)
    return folder


def kill(output: Path, sign: str, *arguments: object) -> Path:
    """Kill an evaluation when a file appears, and return the folder that it leaves."""
    command = [MOEQ, "eval", *arguments, "-o", output]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, start_new_session=True)
    partial = output.with_name(f"{output.name}.partial")
    while process.poll() is None and not list(partial.glob(sign)):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    return partial


def evaluate(moeq: Moeq, output: Path, *arguments: object) -> dict[str, Any]:
    found = moeq("eval", *arguments, "-o", output, "--no-save")
    assert found.code == 0, found.err
    return dict(json.loads(output.read_text()))


def overwrite(path: Path) -> None:
    """Replace states by others of their size: a run that uses them finds something else."""
    count = path.stat().st_size // 4
    torch.from_file(str(path), shared=True, size=count).copy_(torch.randn(count))


class TestKilledWhileReading:
    def test_layer_by_layer(self, moeq: Moeq, quantized: Path, tmp_path: Path) -> None:
        arguments = (quantized, *READ, "--reference", MIXTRAL)
        whole = evaluate(moeq, tmp_path / "whole.json", *arguments)
        output = tmp_path / "cut.json"
        partial = kill(output, "pass-00000/model/hidden/hidden-00002.json", *arguments, "--no-save")
        assert (partial / "pass-00000" / "reference" / "hidden" / f"{LAST}.bin").is_file()
        spoilt = shutil.copytree(partial, tmp_path / "other.json.partial")
        overwrite(spoilt / "pass-00000" / "reference" / "hidden" / f"{LAST}.bin")
        refused = moeq("eval", *arguments, "--max-tokens", 900, "-o", output)
        assert (refused.code, "an unfinished run with other window" in refused.err) == (2, True)

        resumed = evaluate(moeq, output, *arguments)
        assert {name: resumed[name] for name in NUMBERS} == {name: whole[name] for name in NUMBERS}
        assert not partial.exists()
        other = evaluate(moeq, tmp_path / "other.json", *arguments)
        assert other["perplexity"] == whole["perplexity"]
        assert other["kl"]["mean"] > 2 * whole["kl"]["mean"]

    def test_whole_in_transformers(self, moeq: Moeq, tmp_path: Path) -> None:
        build("llama4_text", tmp_path / "source")
        arguments = (tmp_path / "source", *READ, "--batch-size", 1)
        whole = evaluate(moeq, tmp_path / "whole.json", *arguments)
        partial = kill(tmp_path / "cut.json", "pass-00000/model/states.json", *arguments)
        done = json.loads((partial / "pass-00000" / "model" / "states.json").read_text())["windows"]
        assert 0 < done < 10
        spoilt = shutil.copytree(partial, tmp_path / "other.json.partial")
        overwrite(spoilt / "pass-00000" / "model" / "states.bin")
        assert evaluate(moeq, tmp_path / "cut.json", *arguments)["perplexity"] == whole["perplexity"]
        assert evaluate(moeq, tmp_path / "other.json", *arguments)["perplexity"] != whole["perplexity"]

    def test_without_an_output_the_same_command_continues(
        self, moeq: Moeq, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)

        def interrupted(*_arguments: Any, **_options: Any) -> None:
            raise KeyboardInterrupt

        command = ("eval", quantized, *READ[:2], "--max-tokens", 700, "--no-save", "--json")
        with monkeypatch.context() as patch:
            patch.setattr("planner.evaluation.passes.token_losses", interrupted)
            assert moeq(*command).code == 130
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith("quantized-eval-")
        assert list(partial.glob(f"pass-00000/model/hidden/{LAST}.json"))
        assert moeq(*command).code == 0
        assert not partial.exists()


def test_tasks_are_kept_as_they_come(moeq: Moeq, tmp_path: Path) -> None:
    documents = code_documents(30, 60)
    first = write_task(tmp_path / "tasks", documents[:10], "first")
    second = write_task(tmp_path / "tasks", documents, "second")
    arguments = (MIXTRAL, "--tasks", f"{first},{second}")
    partial = kill(tmp_path / "cut.json", "result-*.json", *arguments, "--batch-size", 1)
    (path,) = partial.glob("result-*.json")
    result = json.loads(path.read_text())
    result[0]["value"] = 0.125  # no accuracy of ten documents
    path.write_text(json.dumps(result))
    found = evaluate(moeq, tmp_path / "cut.json", *arguments)["tasks"]
    assert [(it["task"], it["metric"], it["samples"]) for it in found] == [
        ("first", "acc", 10), ("first", "acc_norm", 10), ("second", "acc", 30), ("second", "acc_norm", 30),
    ]  # fmt: skip
    assert found[0]["value"] == 0.125
    assert {it["metric"]: it["value"] for it in found[2:]} == pytest.approx(accuracies(MIXTRAL, documents))

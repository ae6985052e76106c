"""Tasks of lm-eval: the right accuracy, of quantized models too, and one line for what cannot be run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.common.progress import Progress
from planner.evaluation.lm_eval_tasks import PAPER_SUITE, run_tasks
from planner.evaluation.record import TaskResult
from planner.exchange.dense import export_dense
from tests.conftest import Outcome
from tests.folders import save_byte_tokenizer
from tests.paths import MIXTRAL
from tests.tasks import write_task
from vllm_moeq.format import ConfigError, UsageError

pytestmark = pytest.mark.slow


GROUP = """\
group: both_halves
task: [next_line, again]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def code_documents(count: int, width: int) -> list[dict[str, Any]]:
    """Return questions which line follows: the true one, it backwards, or one from further down; lines cut to width.

    The third choice makes some answers wrong, so that agreement of accuracies means something.
    """
    lines = [line[:width] for line in (MIXTRAL / "held_out.txt").read_text().splitlines()]
    lines = [line for line in lines if len(line.strip()) > 8]
    documents = []
    for index in range(count):
        start = 30 * index
        true, other = lines[start + 3], lines[start + 20]
        choices = ["\n" + choice for choice in (true, true[::-1], other)]
        turn = index % 3
        documents.append(
            {
                "context": "\n".join(line.rstrip() for line in lines[start : start + 3]),
                "choices": choices[turn:] + choices[:turn],
                "answer": -turn % 3,
            }
        )
    return documents


@torch.inference_mode()
def accuracies(model: Path, documents: list[dict[str, Any]]) -> dict[str, float]:
    """Return how often the true choice is likeliest: as a whole, and per character."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    right = {"acc": 0, "acc_norm": 0}
    for document in documents:
        known = tokenizer(document["context"])["input_ids"]
        scores = []
        for choice in document["choices"]:
            ids = tokenizer(document["context"] + choice)["input_ids"]
            assert ids[: len(known)] == known
            log_probabilities = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_probabilities[at - 1, ids[at]]) for at in range(len(known), len(ids))))
        per_character = [score / len(choice) for score, choice in zip(scores, document["choices"], strict=True)]
        right["acc"] += scores.index(max(scores)) == document["answer"]
        right["acc_norm"] += per_character.index(max(per_character)) == document["answer"]
    return {metric: count / len(documents) for metric, count in right.items()}


def values(scores: list[TaskResult]) -> dict[str, float]:
    return {score.metric: score.value for score in scores}


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return code_documents(20, 80)


@pytest.fixture
def speaking_copy(quantized_copy: Path) -> Path:
    """The quantized tiny Mixtral with a tokenizer of single bytes."""
    save_byte_tokenizer(quantized_copy)
    return quantized_copy


class TestScores:
    def test_are_those_of_transformers(self, documents: list[dict[str, Any]], tmp_path: Path) -> None:
        path = write_task(tmp_path / "tasks", documents)
        expected = accuracies(MIXTRAL, documents)
        scores = run_tasks(MIXTRAL, [str(path)])
        assert values(scores) == pytest.approx(expected)
        assert 0.5 < expected["acc"] < 1
        for score in scores:
            assert (score.task, score.samples) == ("next_line", 20)
            assert score.stderr == pytest.approx((score.value * (1 - score.value) / 19) ** 0.5)

    def test_of_the_first_documents(self, documents: list[dict[str, Any]], tmp_path: Path) -> None:
        path = write_task(tmp_path / "tasks", documents)
        scores = run_tasks(MIXTRAL, ["next_line"], include=path.parent, limit=7, batch_size=3)
        assert values(scores) == pytest.approx(accuracies(MIXTRAL, documents[:7]))
        assert {score.samples for score in scores} == {7}

    def test_of_a_group(self, documents: list[dict[str, Any]], tmp_path: Path) -> None:
        write_task(tmp_path, documents[:5])
        write_task(tmp_path, documents[5:], "again")
        group = tmp_path / "both.yaml"
        group.write_text(GROUP)
        (score,) = run_tasks(MIXTRAL, [str(group)])
        assert (score.task, score.metric, score.samples) == ("both_halves", "acc", 20)
        assert score.value == pytest.approx(accuracies(MIXTRAL, documents)["acc"])

    def test_of_a_quantized_folder(self, speaking_copy: Path, tmp_path: Path) -> None:
        documents = code_documents(20, 14)
        export_dense(speaking_copy, tmp_path / "dense", Progress(quiet=True), torch.float32)
        scores = run_tasks(speaking_copy, [str(write_task(tmp_path / "tasks", documents))])
        assert values(scores) == pytest.approx(accuracies(tmp_path / "dense", documents))


class TestRefused:
    def test_unknown_tasks(self) -> None:
        """lm-eval knows all of the paper's tasks, so only the misspelt ones are named."""
        with pytest.raises(UsageError) as raised:
            run_tasks(MIXTRAL, [*PAPER_SUITE, "arc_eazy", "hellaswagg"])
        message = str(raised.value)
        assert "YAML files, found 'arc_eazy', 'hellaswagg' (close: arc_easy," in message
        assert "hellaswag" in message.split("close:")[1]

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"none\.yaml: expected a task file of lm-eval, found no such file"):
            run_tasks(MIXTRAL, [str(tmp_path / "none.yaml")])

    def test_a_dataset_that_is_not_there(self, tmp_path: Path, documents: list[dict[str, Any]]) -> None:
        path = write_task(tmp_path / "tasks", documents)
        path.with_suffix(".jsonl").unlink()
        with pytest.raises(UsageError, match=r"task next_line: expected its dataset json, found .*next_line\.jsonl"):
            run_tasks(MIXTRAL, [str(path)])

    def test_a_broken_task(self, tmp_path: Path, documents: list[dict[str, Any]]) -> None:
        path = write_task(tmp_path / "tasks", documents)
        path.write_text(path.read_text().replace("{{answer}}", "{{anser}}"))
        with pytest.raises(UsageError, match=r"task next_line: expected a task .* found: .*'anser' is undefined"):
            run_tasks(MIXTRAL, [str(path)])

    def test_no_documents(self, tmp_path: Path, documents: list[dict[str, Any]]) -> None:
        path = write_task(tmp_path / "tasks", documents)
        with pytest.raises(UsageError, match="expected tasks that lm-eval can run, found"):
            run_tasks(MIXTRAL, [str(path)], limit=0)

    def test_no_lm_eval(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(UsageError, match=r"tasks: expected the package lm-eval, .*pip install '\.\[eval\]'"):
            run_tasks(MIXTRAL, ["piqa"])

    def test_half_of_lm_eval(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An installation without dependencies lacks what lm-eval imports."""
        for name in [name for name in sys.modules if name.startswith("lm_eval")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(UsageError, match=r"tasks: expected the package jinja2, .*pip install '\.\[eval\]'"):
            run_tasks(MIXTRAL, ["piqa"])

    @pytest.mark.parametrize(("tasks", "device"), [([], "cpu"), (["piqa"], "tpu"), (["piqa"], "cpu,cpu")])
    def test_no_task_or_device(self, tasks: list[str], device: str) -> None:
        with pytest.raises(UsageError, match="expected"):
            run_tasks(MIXTRAL, tasks, device=device)

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"config\.json: expected a JSON file"):
            run_tasks(tmp_path, ["piqa"])

    def test_no_tokenizer(self, tmp_path: Path, documents: list[dict[str, Any]]) -> None:
        path = write_task(tmp_path / "tasks", documents)
        shutil.copy(MIXTRAL / "config.json", tmp_path)
        with pytest.raises(ConfigError, match="transformers cannot load it"):
            run_tasks(tmp_path, [str(path)])


def test_compare_runs_tasks_on_every_model(moeq: Callable[..., Outcome], tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", code_documents(6, 60))
    flags = ("--methods", "uniform", "--avg-bits", 2, "--held-out", MIXTRAL / "held_out.txt", "--max-tokens", 256)
    found = moeq("compare", MIXTRAL, *flags, "--tasks", task, "-o", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    original, uniform = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert original["tasks"]["next_line acc"][0] == pytest.approx(accuracies(MIXTRAL, code_documents(6, 60))["acc"])
    assert set(uniform["tasks"]) == {"next_line acc", "next_line acc_norm"}
    assert "next_line acc (original" in (tmp_path / "out" / "compare.md").read_text()

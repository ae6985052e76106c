"""``moeq eval`` on tasks of local files: through transformers and through vLLM's server, without a network."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.evaluation.record import read_evaluations
from tests.conftest import Outcome, run_here
from tests.paths import MIXTRAL
from tests.planner.evaluation.test_tasks import accuracies, code_documents
from tests.tasks import write_task

pytestmark = pytest.mark.slow

NEW_TOKENS = 6

ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - metric: bits_per_byte
"""
WRITTEN = f"""\
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["<none>"]
  max_gen_toks: {NEW_TOKENS}
  do_sample: false
metric_list:
  - metric: exact_match
"""

Moeq = Callable[..., Outcome]
Documents = list[dict[str, Any]]


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """The shipped Mixtral, its experts at four bits, so that its answers are far from ties."""
    flags = ("--method", "uniform", "--bits", "4", "--avg-bits", 4, "--quantizer", "rtn")
    run_here("quantize", MIXTRAL, *flags, "-o", tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.fixture
def dense(quantized: Path, tmp_path: Path) -> Path:
    run_here("export", quantized, "-o", tmp_path / "dense", "--format", "f32")
    return tmp_path / "dense"


@torch.inference_mode()
def bits_per_byte(folder: Path, texts: list[str]) -> float:
    """Return Σ −log₂ p / Σ bytes, each text behind the token that begins or ends one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    for text in texts:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = torch.tensor([first, *tokenizer(text)["input_ids"]])
        total -= float(model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None]).sum())
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.inference_mode()
def continuations(folder: Path, texts: list[str]) -> list[str]:
    """Return what the model writes behind each text, the likeliest token every time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        written = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_a_score_that_is_not_finite(
    moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change_tensor: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(MIXTRAL, tmp_path / "overflows"))
    change_tensor(folder, "model.norm.weight", lambda weight: weight.fill_(3e38))
    task = write_task(tmp_path / "tasks", code_documents(2, 60), "rolling", ROLLING)
    monkeypatch.chdir(tmp_path)
    outcome = moeq("eval", folder, "--tasks", task)
    message = outcome.err.splitlines()[-1]  # behind lm-eval's progress
    assert outcome.code == 2
    expected = "expected a finite bits_per_byte, found nan: the model's outputs are not finite"
    assert message == f"error: {folder}: task rolling: {expected}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overflows", "tasks"]


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.server)])
def test_every_kind_of_task(moeq: Moeq, quantized: Path, dense: Path, tmp_path: Path, backend: str) -> None:
    documents = code_documents(30, 60)
    texts = [document["context"] for document in documents]
    written = [{"context": text, "answer": a} for text, a in zip(texts, continuations(dense, texts), strict=True)]
    files = [
        write_task(tmp_path / "tasks", documents),
        write_task(tmp_path / "tasks", documents, "rolling", ROLLING),
        write_task(tmp_path / "tasks", written, "written", WRITTEN),
    ]
    tasks = ",".join(map(str, files))
    outcome = moeq("eval", quantized, "--tasks", tasks, "--limit", 25, "--backend", backend, "--json")
    assert outcome.code == 0, outcome.err
    results = {(it["task"], it["metric"]): it for it in json.loads(outcome.out)["tasks"]}
    values = {key: result["value"] for key, result in results.items()}
    expected = accuracies(dense, documents[:25])
    # vLLM computes in bfloat16, where some choices are as good as tied.
    ties = 0.0 if backend == "transformers" else 2 / 25
    assert values["next_line", "acc"] == pytest.approx(expected["acc"], abs=ties + 1e-9)
    assert values["next_line", "acc_norm"] == pytest.approx(expected["acc_norm"], abs=ties + 1e-9)
    near = 1e-4 if backend == "transformers" else 1e-2
    assert values["rolling", "bits_per_byte"] == pytest.approx(bits_per_byte(dense, texts[:25]), rel=near)
    assert values["written", "exact_match"] >= (1.0 if backend == "transformers" else 0.7)
    assert {it["samples"] for it in results.values()} == {25}
    kept = {(it.task, it.metric): it for it in read_evaluations(quantized).tasks}
    assert {key: it.value for key, it in kept.items()} == values
    assert {(it.backend, it.limit) for it in kept.values()} == {(backend, 25)}


def test_lm_evals_own_command(moeq_process: Moeq, quantized: Path, dense: Path, tmp_path: Path) -> None:
    documents = code_documents(10, 60)
    task = write_task(tmp_path / "tasks", documents)
    model = f"pretrained={quantized},dtype=float32,softmax_dtype=float32"
    flags = ("--tasks", task, "--device", "cpu", "--output_path", tmp_path / "results.json")
    outcome = moeq_process("lm-eval", "--model", "hf", "--model_args", model, *flags)
    assert outcome.code == 0, outcome.err
    assert "|next_line|" in outcome.out
    (written,) = tmp_path.glob("results_*.json")
    found = json.loads(written.read_text())["results"]["next_line"]
    expected = accuracies(dense, documents)
    assert found["acc,none"] == pytest.approx(expected["acc"])
    assert found["acc_norm,none"] == pytest.approx(expected["acc_norm"])


def test_text_and_tasks_together(moeq: Moeq, quantized: Path, tmp_path: Path) -> None:
    path = write_task(tmp_path / "tasks", code_documents(6, 40))
    data = ("--data", MIXTRAL / "held_out.txt", "--max-tokens", 200)
    outcome = moeq("eval", quantized, *data, "--tasks", path)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("perplexity ")
    assert "next_line" in outcome.out
    kept = read_evaluations(quantized)
    assert (len(kept.texts), len(kept.tasks)) == (1, 2)

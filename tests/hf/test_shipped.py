"""The shipped models: the same text, and the same answers in lm-eval, as their dense exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.hf.conftest import Pair, logits, shipped_pair
from tests.paths import MIXTRAL, SHIPPED
from tests.tasks import write_task

pytestmark = pytest.mark.compiler

PROMPTS = ["def main(", "import os\n\nclass Path"]


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return shipped_pair(request.param, tmp_path_factory.mktemp("shipped"), quantizer="rtn")


def test_greedy_tokens_are_the_same(shipped: Pair) -> None:
    """In float32: in bfloat16 the two round in other places, and two tokens that are nearly as likely change ranks."""
    packed, dense = (shipped.load(which, torch.float32) for which in ("quantized", "dense"))
    tokenizer = AutoTokenizer.from_pretrained(shipped.quantized)
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        found, expected = (model.generate(**tokens, max_new_tokens=16, do_sample=False) for model in (packed, dense))
        assert found.tolist() == expected.tolist()
    expected = logits(dense)
    torch.testing.assert_close(logits(packed), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_bfloat16_logits_are_as_near_to_float32_as_the_dense_exports(shipped: Pair) -> None:
    exact = logits(shipped.load("dense", torch.float32))
    packed, dense = (
        float((logits(shipped.load(which, torch.bfloat16)) - exact).norm()) for which in ("quantized", "dense")
    )
    assert packed < 1.5 * dense < 0.1 * float(exact.norm())


def test_lm_eval_scores_it_as_the_dense_export(shipped: Pair, tmp_path: Path) -> None:
    """lm-eval's own class loads the folder by its name: the import is all that it takes."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lines = [line for line in (MIXTRAL / "held_out.txt").read_text().splitlines() if len(line) > 20]
    documents = [
        {"context": "\n".join(lines[i : i + 2]), "choices": [f"\n{lines[i + 2]}", f"\n{lines[i + 9]}"], "answer": 0}
        for i in range(0, 120, 10)
    ]
    write_task(tmp_path, documents)

    def answers(folder: Path) -> list[Any]:
        model = HFLM(str(folder), device="cpu", dtype=torch.float32, batch_size=4)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = simple_evaluate(model, tasks=["next_line"], task_manager=manager, bootstrap_iters=0)
        return [choice[0] for sample in results["samples"]["next_line"] for choice in sample["filtered_resps"]]

    assert answers(shipped.quantized) == pytest.approx(answers(shipped.dense), rel=1e-5)

"""``moeq eval`` on texts: its numbers against transformers, its record, mistakes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planner.api.keywords.tasks import TaskKeywords
from planner.common.progress import Progress
from planner.evaluation.lm_eval_tasks import PAPER_SUITE
from planner.evaluation.record import read_evaluations
from planner.exchange.dense import export_dense
from tests.architectures import build, quantize
from tests.conftest import Outcome, one_line, run_here
from tests.paths import MIXTRAL
from tests.shipped import MIXTRAL_SIZES
from vllm_moeq.format import verify

pytestmark = pytest.mark.slow

HELD_OUT = MIXTRAL / "held_out.txt"
TOKENS, WINDOW = 1100, 256
RESAMPLED = 0.4  # standard errors over five windows, with resampling and without
READ = ("--data", HELD_OUT, "--max-tokens", TOKENS, "--window", WINDOW)

Moeq = Callable[..., Outcome]
Likely = list[torch.Tensor]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped Mixtral at two bits; not to be changed."""
    folder = tmp_path_factory.mktemp("eval") / "quantized"
    flags = ("--method", "router-norm-maxvar", "--avg-bits", 2, "--quantizer", "rtn")
    run_here("quantize", MIXTRAL, *flags, "-o", folder)
    return folder


@pytest.fixture(scope="module")
def dense(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same values, not packed."""
    folder = tmp_path_factory.mktemp("eval") / "dense"
    export_dense(quantized, folder, Progress(quiet=True), torch.float32)
    return folder


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "copy"))


def tokens(folder: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    return torch.tensor(AutoTokenizer.from_pretrained(folder)(HELD_OUT.read_text())["input_ids"][:TOKENS])


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def predictions(model: Any, ids: torch.Tensor) -> Likely:
    """Return float64 log-probabilities [tokens, vocabulary] of each window by itself, the last one shorter."""
    windows = [ids[begin : begin + WINDOW] for begin in range(0, len(ids) - 1, WINDOW)]
    windows[-1] = windows[-1][: (len(ids) - 1) % WINDOW or WINDOW]
    return [model(input_ids=window[None]).logits[0].double().log_softmax(dim=-1) for window in windows]


def per_token(likely: Likely, ids: torch.Tensor) -> torch.Tensor:
    return -torch.cat(likely).gather(1, ids[1:, None])[:, 0]


def divergences(exact: Likely, likely: Likely) -> torch.Tensor:
    return torch.cat([(a.exp() * (a - b)).sum(dim=1) for a, b in zip(exact, likely, strict=True)])


def error_of_mean(values: torch.Tensor) -> float:
    """Return the standard error over windows without resampling."""
    parts = [part - values.mean() for part in values.split(WINDOW)]
    return math.sqrt(sum(float(part.sum()) ** 2 for part in parts)) / len(values)


def evaluate(moeq: Moeq, *arguments: object) -> dict[str, Any]:
    found = moeq("eval", *arguments, "--json")
    assert found.code == 0, found.err
    return dict(json.loads(found.out))


def assert_is(found: dict[str, Any], likely: Likely, exact: Likely, ids: torch.Tensor) -> None:
    """Compare a result with what transformers predicts as the model and as the reference."""
    loss, reference, divergence = per_token(likely, ids), per_token(exact, ids), divergences(exact, likely)
    same = torch.cat([a.argmax(dim=1) == b.argmax(dim=1) for a, b in zip(exact, likely, strict=True)]).double()
    assert (found["tokens"], found["window"]) == (len(ids) - 1, WINDOW)
    for name, losses in (("perplexity", loss), ("reference_perplexity", reference)):
        assert found[name] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
        assert found[f"{name}_error"] / found[name] == pytest.approx(error_of_mean(losses), rel=RESAMPLED)
    kl = found["kl"]
    assert kl["mean"] == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert kl["median"] == pytest.approx(float(divergence.median()), rel=1e-3)
    assert kl["p99"] == pytest.approx(float(np.quantile(divergence, 0.99)), rel=1e-3)
    assert kl["max"] == pytest.approx(float(divergence.max()), rel=1e-3)
    assert kl["same_top"] == pytest.approx(float(same.mean()), abs=1.5 / len(same))
    assert kl["error"] == pytest.approx(error_of_mean(divergence), rel=RESAMPLED)
    assert kl["same_top_error"] == pytest.approx(error_of_mean(same), rel=RESAMPLED)


class TestNumbers:
    def test_of_a_quantized_checkpoint(self, moeq: Moeq, quantized: Path, dense: Path) -> None:
        ids = tokens(MIXTRAL)
        likely, exact = (predictions(load(folder), ids) for folder in (dense, MIXTRAL))
        found = evaluate(moeq, quantized, *READ, "--reference", MIXTRAL, "--no-save")
        assert_is(found, likely, exact, ids)
        assert found["kl"]["mean"] > 0.1

    def test_of_a_dense_model_in_small_batches(self, moeq: Moeq, dense: Path) -> None:
        ids = tokens(MIXTRAL)
        likely, exact = (predictions(load(folder), ids) for folder in (MIXTRAL, dense))
        found = evaluate(moeq, MIXTRAL, *READ, "--reference", dense, "--batch-size", 1)
        assert_is(found, likely, exact, ids)

    @pytest.mark.parametrize("name", ["llama4_text", "gpt_oss"])
    def test_of_models_that_transformers_loads_whole(self, moeq: Moeq, tmp_path: Path, name: str) -> None:
        source, unpacked = tmp_path / "source", tmp_path / "dense"
        build(name, source)
        packed = quantize(source, tmp_path / "quantized")
        export_dense(packed, unpacked, Progress(quiet=True), torch.float32)
        ids = tokens(source)
        found = evaluate(moeq, packed, *READ, "--reference", source, "--no-save")
        assert_is(found, predictions(load(unpacked), ids), predictions(load(source), ids), ids)

    def test_in_several_passes(self, moeq: Moeq, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flags = (quantized, *READ, "--reference", MIXTRAL, "--no-save")
        whole = evaluate(moeq, *flags)
        monkeypatch.setattr("planner.evaluation.passes.STATES", 2 * WINDOW * 128 * 4)
        passes = evaluate(moeq, *flags)
        assert passes["kl"] == pytest.approx(whole["kl"], rel=1e-4)
        assert passes["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)


def prune(weights: list[float], threshold: float) -> list[float]:
    """The rule of ODP in plain Python, for one token."""
    kept = [weight if weight >= threshold * max(weights) else 0.0 for weight in weights]
    return [weight * sum(weights) / sum(kept) for weight in kept]


def prune_call(threshold: float, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A forward pre-hook of transformers' experts."""
    states, ids, weights = arguments
    return states, ids, torch.tensor([prune(token, threshold) for token in weights.tolist()], dtype=weights.dtype)


def test_weak_experts_are_skipped(moeq: Moeq, copy: Path, dense: Path, change_config: Callable[..., None]) -> None:
    thresholds = {0: 0.5, 2: 0.9}
    odp = {f"model.layers.{layer}.block_sparse_moe.experts": value for layer, value in thresholds.items()}
    change_config(copy, lambda config: config["quantization_config"].update(odp=odp))
    model, ids = load(dense), tokens(MIXTRAL)
    whole = float(per_token(predictions(model, ids), ids).mean().exp())
    for layer, value in thresholds.items():
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(partial(prune_call, value))
    expected = float(per_token(predictions(model, ids), ids).mean().exp())
    assert evaluate(moeq, copy, *READ)["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(whole, rel=1e-3)


class TestRecord:
    def test_results_are_kept_with_the_checkpoint(self, moeq: Moeq, copy: Path) -> None:
        first = evaluate(moeq, copy, *READ)
        second = evaluate(moeq, copy, *READ[:2], "--max-tokens", 300, "--reference", MIXTRAL)
        again = evaluate(moeq, copy, *READ)
        kept = read_evaluations(copy).texts
        assert [(it.tokens, it.data) for it in kept] == [(299, "held_out.txt"), (TOKENS - 1, "held_out.txt")]
        assert kept[0].reference == "stdlib-mixtral"
        assert kept[0].kl is not None
        assert kept[0].kl.mean == second["kl"]["mean"]
        assert kept[1].perplexity == again["perplexity"] == first["perplexity"]
        assert verify(copy).experts == MIXTRAL_SIZES.all_experts

    def test_unless_it_is_unwanted(self, moeq: Moeq, copy: Path, tmp_path: Path) -> None:
        output = tmp_path / "result.json"
        found = evaluate(moeq, copy, *READ, "--no-save", "-o", output)
        assert json.loads(output.read_text()) == found
        assert found["data"] == str(HELD_OUT)
        assert not (copy / "evaluation.json").exists()
        assert [path.name for path in tmp_path.iterdir() if path != copy] == ["result.json"]

    def test_not_beside_other_models(self, moeq: Moeq, dense: Path) -> None:
        evaluate(moeq, dense, *READ)
        assert not (dense / "evaluation.json").exists()

    def test_for_people(self, moeq: Moeq, quantized: Path) -> None:
        outcome = moeq("eval", quantized, *READ, "--reference", MIXTRAL, "--no-save")
        lines = outcome.out.splitlines()
        assert [line.split()[0] for line in lines] == ["perplexity", "perplexity", "KL", "same"]
        assert all(" ± " in line for line in lines)


class TestRefused:
    @pytest.fixture
    def refused(self, moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
        """Return a function that runs a wrong command, checks that nothing is left, and returns its message."""

        def run(*arguments: object) -> str:
            monkeypatch.chdir(tmp_path)
            before = sorted(tmp_path.rglob("*"))
            message = one_line(moeq("eval", *arguments))
            assert sorted(tmp_path.rglob("*")) == before
            return message

        return run

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ((), "--data, --tasks, --suite: expected at least one of them, found none"),
            (("--tasks", "piqa", "--suite", "paper"), "--tasks and --suite: expected one of them, found both"),
            (("--tasks", "piqa,"), "--tasks: expected names or files such as piqa,arc_easy, found 'piqa,'"),
            (("--data", "none.txt"), "none.txt: cannot read (No such file or directory); expected a text file"),
            (("--tasks", "piqa", "--reference", MIXTRAL), "--reference: expected --data FILE with it"),
            (("--data", HELD_OUT, "--reference", "none"), "none: expected a model folder or a Hub name"),
            (("--data", HELD_OUT, "--window", 513), "--window: expected at most 512, the model's longest text"),
            (("--data", HELD_OUT, "--device", "tpu"), "--device: expected cpu, cuda or a list"),
            (("--data", HELD_OUT, "--device", "cpu,cpu"), "--device: expected one device"),
            (
                ("--data", HELD_OUT, "--tasks", "none.yaml"),
                "none.yaml: expected a task file of lm-eval, found no such file",
            ),
            (("--tasks", "none.yaml"), "none.yaml: expected a task file of lm-eval, found no such file"),
            (("--data", HELD_OUT, "-o", "no/result.json"), "no/result.json: expected the parent folder"),
        ],
    )
    def test_mistakes(self, refused: Callable[..., str], flags: tuple[object, ...], message: str) -> None:
        assert message in refused(MIXTRAL, *flags)

    def test_too_little_text(self, refused: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("def")
        message = refused(MIXTRAL, "--data", tmp_path / "short.txt")
        assert "--data short.txt: expected a text of at least two tokens, found 1" in message

    @pytest.mark.parametrize("norm", [3e38, 1e30])
    @pytest.mark.parametrize("which", ["model", "reference"])
    def test_outputs_that_are_not_finite(
        self, refused: Callable[..., str], tmp_path: Path, change_tensor: Callable[..., Path], which: str, norm: float
    ) -> None:
        """By finite weights: the products overflow, or the loss is so large that its exp does."""
        folder = Path(shutil.copytree(MIXTRAL, tmp_path / "overflows"))
        change_tensor(folder, "model.norm.weight", lambda weight: weight.fill_(norm))
        models = (folder,) if which == "model" else (MIXTRAL, "--reference", folder)
        message = refused(*models, "--data", HELD_OUT, "--max-tokens", 64, "--window", 32)
        expected = (
            f"error: {folder}: its outputs on the text are not finite: expected a loss of at most 500 nats per token"
        )
        assert message.startswith(expected)

    def test_a_reference_with_more_tokens(self, refused: Callable[..., str], tiny_mixtral: Path) -> None:
        message = refused(MIXTRAL, *READ, "--reference", tiny_mixtral)
        assert f"--reference {tiny_mixtral}: expected the vocabulary of {MIXTRAL}, 2,048 tokens, found 256" in message

    def test_a_reference_with_other_tokens(self, refused: Callable[..., str], tmp_path: Path) -> None:
        other = Path(shutil.copytree(MIXTRAL, tmp_path / "other"))
        content = json.loads((other / "tokenizer.json").read_text())
        words = content["model"]["vocab"]
        words["def"], words["self"] = words["self"], words["def"]
        (other / "tokenizer.json").write_text(json.dumps(content))
        message = refused(MIXTRAL, *READ, "--reference", other)
        assert f"--reference {other}: expected the vocabulary of {MIXTRAL}, found another: token 'def'" in message

    def test_a_damaged_record(self, refused: Callable[..., str], copy: Path) -> None:
        (copy / "evaluation.json").write_text('{"version": 2}')
        assert f"{copy / 'evaluation.json'}: version" in refused(copy, *READ)


def test_the_papers_suite() -> None:
    assert TaskKeywords(suite="paper").task_names() == PAPER_SUITE
    assert len(PAPER_SUITE) == 8

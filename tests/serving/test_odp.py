"""Skipping weak experts while serving: what the user asks for is what the served model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving.throughput import Answer
from tests.paths import MOEQ
from tests.serving.conftest import Pair
from tests.serving.test_server import ask, prompts
from tests.shipped import MIXTRAL_SIZES

pytestmark = pytest.mark.slow

THRESHOLD = 0.8
LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
CONFIG: dict[str, Any] = {
    "quant_method": "moeq",
    "format_version": 1,
    "group_size": 128,
    "projections": {"gate": "w1", "up": "w3", "down": "w2"},
    "experts": {prefix: [2, 2] for prefix in LAYERS},
    "linear": {"bits": 16, "group_size": 128},
    "unquantized": [],
    "plan": {"method": "uniform", "avg_bits": 2.0, "achieved_avg_bits": 2.0, "bit_choices": [2]},
    "odp": {LAYERS[0]: 0.25},
}
# What vLLM does between reading config.json and building the model, once for each object of overrides.
UPDATE = """
import json, sys
from types import SimpleNamespace
from vllm_moeq.format import UsageError
from vllm_moeq.serving.config import MoeqQuantizationConfig
config, overrides = map(json.loads, sys.argv[1:])
results = []
for override in overrides:
    ours = MoeqQuantizationConfig.from_config(config)
    try:
        ours.maybe_update_config("owner/name", hf_config=SimpleNamespace(**override))
        results.append(ours.odp)
    except UsageError as error:
        results.append(str(error))
print(json.dumps(results))
"""


# Overrides, and the thresholds after them: the user's take the place of the checkpoint's.
ACCEPTED: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({}, {LAYERS[0]: 0.25}),
    ({"moeq_odp": 0.5}, {LAYERS[0]: 0.5, LAYERS[1]: 0.5}),
    ({"moeq_odp": 0}, {LAYERS[0]: 0.0, LAYERS[1]: 0.0}),
    ({"moeq_odp": {LAYERS[1]: 1}}, {LAYERS[1]: 1.0}),
    ({"moeq_odp": {}}, {}),
]
REFUSED: list[Any] = [-0.1, 1.5, float("nan"), float("inf"), "0.5", True, None, [0.5], {LAYERS[0]: "0.5"}]
UNKNOWN = {"model.layers.7.mlp.experts": 0.5}


@pytest.fixture(scope="module")
def outcomes() -> list[Any]:
    """Thresholds, or the message of the error: of ACCEPTED, then of REFUSED, then of UNKNOWN."""
    overrides = [override for override, _ in ACCEPTED] + [{"moeq_odp": value} for value in [*REFUSED, UNKNOWN]]
    command = [sys.executable, "-c", UPDATE, json.dumps(CONFIG), json.dumps(overrides)]
    return list(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def test_an_override_takes_the_place_of_the_checkpoints_thresholds(outcomes: list[Any]) -> None:
    assert outcomes[: len(ACCEPTED)] == [expected for _, expected in ACCEPTED]


def test_other_overrides_are_refused_in_one_line(outcomes: list[Any]) -> None:
    for value, message in zip(REFUSED, outcomes[len(ACCEPTED) : -1], strict=True):
        assert message == (
            "--hf-overrides: moeq_odp: expected a number from 0 to 1, "
            f"or an object from experts prefixes to such numbers, found {value!r}"
        )


def test_an_override_for_no_layer_is_refused(outcomes: list[Any]) -> None:
    assert outcomes[-1] == (
        "--hf-overrides: moeq_odp: expected prefixes of quantization_config.experts such as "
        f"{LAYERS[0]}, found 'model.layers.7.mlp.experts'"
    )


def prune(weights: list[float], threshold: float) -> list[float]:
    """The rule in plain Python, for one token."""
    kept = [weight if weight >= threshold * max(weights) else 0.0 for weight in weights]
    return [weight * sum(weights) / sum(kept) for weight in kept]


def prune_experts_call(
    threshold: float, _: torch.nn.Module, arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A forward pre-hook of transformers' experts."""
    states, ids, weights = arguments
    return states, ids, torch.tensor([prune(token, threshold) for token in weights.tolist()], dtype=weights.dtype)


@torch.inference_mode()
def dense_logprobs(folder: Path, threshold: float, texts: list[str], answers: list[Answer]) -> list[torch.Tensor]:
    """Return transformers' log-probabilities [new tokens, vocabulary] at each place where the server chose a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(partial(prune_experts_call, threshold))
    result = []
    for text, answer in zip(texts, answers, strict=True):
        ids = [*tokenizer(text)["input_ids"], *chosen(answer).tolist()]
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -len(answer.tokens) :]
        result.append(logits.log_softmax(dim=-1))
    return result


def chosen(answer: Answer) -> torch.Tensor:
    return torch.tensor([int(token.removeprefix("token_id:")) for token in answer.tokens])


def difference(expected: list[torch.Tensor], answers: list[Answer]) -> float:
    """Return how far the log-probabilities of the server's tokens are from the expected ones on average."""
    errors = []
    for logprobs, answer in zip(expected, answers, strict=True):
        served = torch.tensor([top[token] for top, token in zip(answer.top, answer.tokens, strict=True)])
        errors.append((logprobs.gather(1, chosen(answer)[:, None])[:, 0] - served).abs())
    return float(torch.cat(errors).mean())


@pytest.mark.server
@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (1, []),
        pytest.param(2, ["--tensor-parallel-size", "2", "--enable-expert-parallel"], marks=pytest.mark.full),
    ],
    ids=["tp1", "tp2-ep"],
)
def test_server_skips_weak_experts(ranks: int, extra: list[str], mixtral: Pair, tmp_path: Path) -> None:
    """In float32: with bfloat16's noise, weights near the threshold fall on either side of it.

    vLLM's CPU kernels for 4-bit linears have no float32, so the linears stay as they are.
    """
    quantized, dense, log = tmp_path / "quantized", tmp_path / "dense", tmp_path / "log"
    same_widths: list[str | Path] = ["--plan", mixtral.quantized / "plan.json", "--linear-bits", "16"]
    subprocess.run([MOEQ, "quantize", mixtral.source, "-o", quantized, *same_widths], check=True)
    subprocess.run([MOEQ, "export", quantized, "-o", dense], check=True)
    texts = prompts(mixtral.source)[:8]
    flags = ["--dtype", "float32", "--enforce-eager", "--hf-overrides", json.dumps({"moeq_odp": THRESHOLD}), *extra]
    answers = ask(quantized, texts, log, flags, ranks)

    pruned = dense_logprobs(dense, THRESHOLD, texts, answers)
    # The best token after each prefix of the answer: all equal means the same greedy text.
    for logprobs, answer in zip(pruned, answers, strict=True):
        assert torch.equal(logprobs.argmax(dim=-1), chosen(answer))
    # What is left is the dense experts' rounding to bfloat16.
    left = difference(pruned, answers)
    assert left < 0.01
    assert difference(dense_logprobs(dense, 0.0, texts, answers), answers) > 10 * left
    assert f"moeq: ODP in {MIXTRAL_SIZES.layers} of {MIXTRAL_SIZES.layers} MoE layers" in log.read_text()

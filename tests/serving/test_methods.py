"""Whatever method chose the widths, vLLM serves them: real servers, against perplexities computed by transformers."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
from openai import OpenAI

from planner.common.progress import Progress
from planner.evaluation import perplexity, read_text
from planner.evaluation.vllm_server import Server, cpu_environment
from tests.paths import CALIBRATION_TEXT, MIXTRAL, MOEQ
from tests.tiers import thorough

pytestmark = pytest.mark.slow

FLAGS = ["--max-model-len", "512", "--max-num-seqs", "4", "--dtype", "bfloat16", "--enforce-eager"]
PROMPTS = 3


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all three methods need, of one text."""
    output = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    data: list[str | Path] = ["--data", CALIBRATION_TEXT, "--samples", "4", "--seq-len", "128"]
    subprocess.run([MOEQ, "calibrate", MIXTRAL, *data, "--for", "kl,pmq,bsp", "-o", output], check=True)
    return output


def served_losses(folder: Path, texts: list[str], log: Path) -> list[tuple[float, int]]:
    """Return each text's negative log-likelihood and its predicted tokens, by the server's log-probabilities."""
    losses = []
    with Server(folder, log, FLAGS, cpu_environment()) as server:
        client = OpenAI(base_url=server.url, api_key="none")
        for text in texts:
            reply = client.completions.create(
                model="model", prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
            )
            scored = reply.choices[0].model_dump()["prompt_logprobs"][1:]
            losses.append((-sum(next(iter(entry.values()))["logprob"] for entry in scored), len(scored)))
    return losses


@pytest.mark.server
@pytest.mark.parametrize("method", thorough(["kl", "pmq", "bsp"], ["bsp"]))
def test_every_plan_is_served(method: str, stats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    flags: list[str | Path] = ["--method", method, "--stats", stats, "--avg-bits", "2.25"]
    subprocess.run([MOEQ, "quantize", MIXTRAL, "-o", folder, *flags], check=True)
    widths = json.loads((folder / "config.json").read_text())["quantization_config"]["experts"]
    assert len({bits for layer in widths.values() for bits in layer}) > 1
    held_out = read_text(MIXTRAL / "held_out.txt")
    texts = [held_out[begin : begin + 600] for begin in range(0, 30_000, 30_000 // PROMPTS)]
    losses = served_losses(folder, texts, tmp_path / "log")
    offline = [math.log(perplexity(folder, text, Progress(quiet=True))) for text in texts]
    tokens = sum(count for _, count in losses)
    expected = sum(mean * count for mean, (_, count) in zip(offline, losses, strict=True)) / tokens
    assert sum(loss for loss, _ in losses) / tokens == pytest.approx(expected, rel=0.01)

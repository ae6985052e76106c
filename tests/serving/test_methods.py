"""Whatever method chose the widths, vLLM serves them: real servers, against perplexities computed by transformers.

In every run, test_server.py compares the perplexity of the paper's rule, and test_readme.py serves a plan of ``kl``.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from planner.evaluation.vllm_server import Server, cpu_environment
from tests.paths import CALIBRATION_TEXT, MIXTRAL, MOEQ
from tests.serving.conftest import losses

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


@pytest.mark.server
@pytest.mark.full
@pytest.mark.parametrize("method", ["kl", "pmq", "bsp"])
def test_every_plan_is_served(method: str, stats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    flags: list[str | Path] = ["--method", method, "--stats", stats, "--avg-bits", "2.25"]
    subprocess.run([MOEQ, "quantize", MIXTRAL, "-o", folder, *flags], check=True)
    widths = json.loads((folder / "config.json").read_text())["quantization_config"]["experts"]
    assert len({bits for layer in widths.values() for bits in layer}) > 1
    held_out = (MIXTRAL / "held_out.txt").read_text(encoding="utf-8")
    texts = [held_out[begin : begin + 600] for begin in range(0, 30_000, 30_000 // PROMPTS)]
    with Server(folder, tmp_path / "log", FLAGS, cpu_environment()) as server:
        served, offline = losses(server, texts)
    assert served == pytest.approx(offline, rel=0.01)

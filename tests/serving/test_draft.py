"""A checkpoint as the draft of another: a real server. test_options.py builds such a draft without one."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from openai import OpenAI

from planner.evaluation.vllm_server import Server, cpu_environment
from tests.serving.conftest import Pair

FLAGS = ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager", "--dtype", "float32"]


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.full
def test_a_model_that_drafts_for_itself_accepts_every_token(mixtral: Pair, tmp_path: Path) -> None:
    draft = {"model": str(mixtral.quantized), "method": "draft_model", "num_speculative_tokens": 2}
    flags = [*FLAGS, "--speculative-config", json.dumps(draft)]
    with Server(mixtral.quantized, tmp_path / "log", flags, cpu_environment()) as server:
        client = OpenAI(base_url=server.url, api_key="none")
        client.completions.create(model="model", prompt="def main(", max_tokens=16, temperature=0)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as reply:
            lines = reply.read().decode().splitlines()
    counts = {
        name: sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:spec_decode_num_{name}_t"))
        for name in ("draft_tokens", "accepted_tokens")
    }
    assert counts["draft_tokens"] == counts["accepted_tokens"] > 0

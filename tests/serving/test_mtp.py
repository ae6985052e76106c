"""A checkpoint that keeps its layer for speculative decoding drafts with it: the same tokens, some drafts accepted."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from planner import quantize
from planner.common.progress import Progress
from planner.evaluation.vllm_server import Server, cpu_environment
from planner.exchange.dense import export_dense
from tests.conftest import bound_to_cores
from tests.serving.test_architectures import EAGER, FLAGS, NEW_TOKENS, PROMPTS
from tests.serving.test_lora import greedy
from tests.speculative import build_with_mtp
from tests.tiers import thorough

SPECULATION = json.dumps({"method": "mtp", "num_speculative_tokens": 1})


@pytest.mark.server
@pytest.mark.parametrize("name", thorough(["glm4_moe", "deepseek_v3"], ["glm4_moe"]))
def test_drafts_of_kept_layers_change_no_token(name: str, tmp_path: Path) -> None:
    ours, dense = tmp_path / "ours", tmp_path / "dense"
    source = build_with_mtp(name, tmp_path / "source")
    quantize(str(source), avg_bits=3, bits="2,3,4", group_size=32, mtp="keep", output=ours)
    export_dense(ours, dense, Progress(quiet=True), torch.float32)
    flags = [*FLAGS, EAGER, "--dtype", "float32", "--speculative-config", SPECULATION]
    with Server(ours, tmp_path / "log", flags, {**cpu_environment(), **bound_to_cores(1)}) as server:
        reply = OpenAI(base_url=server.url, api_key="none").completions.create(
            model="model", prompt=PROMPTS, max_tokens=NEW_TOKENS, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as metrics:
            lines = metrics.read().decode().splitlines()
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    assert [getattr(choice, "token_ids", None) for choice in choices] == greedy(dense)
    drafted, accepted = (
        sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f"vllm:spec_decode_num_{kind}_tokens_total")
        )
        for kind in ("draft", "accepted")
    )
    print(f"{name}: {accepted:.0f} of {drafted:.0f} drafts accepted")
    assert 0 < accepted < drafted

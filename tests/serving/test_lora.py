"""Adapters of attention beside packed experts: served tokens are those of the dense model with the adapter added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file

from planner.common.progress import Progress
from planner.evaluation.vllm_server import Server, cpu_environment
from planner.exchange.dense import export_dense
from tests.architectures import SIZES, build, quantize
from tests.conftest import bound_to_cores
from tests.serving.test_architectures import EAGER, FLAGS, NEW_TOKENS, PROMPTS

pytestmark = pytest.mark.server

RANK, ALPHA = 8, 16
ADAPTED = ("q_proj", "v_proj")


def write_adapter(dense: Path, folder: Path) -> Path:
    """Write a random adapter as peft does, and add it to the weights of a dense checkpoint."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(dense.glob("*.safetensors")):
        weights = load_file(path)
        for name in weights:
            if not name.endswith(tuple(f"{it}.weight" for it in ADAPTED)):
                continue
            rows, columns = weights[name].shape
            down = torch.randn(RANK, columns, generator=generator) * 0.2
            up = torch.randn(rows, RANK, generator=generator) * 0.2
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            weights[name] = weights[name] + ALPHA / RANK * up @ down
        save_file(weights, path, metadata={"format": "pt"})
    assert len(tensors) == 2 * len(ADAPTED) * SIZES["num_hidden_layers"]
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ADAPTED, "bias": "none"})
    )
    return folder


def greedy(folder: Path) -> list[list[int]]:
    """Return the tokens of transformers for a dense checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model.generate(
        torch.tensor(PROMPTS), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return [row[len(PROMPTS[0]) :].tolist() for row in found]


def test_an_adapter_of_attention_is_served_beside_packed_experts(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "source")
    ours, dense = quantize(tmp_path / "source", tmp_path / "ours"), tmp_path / "dense"
    export_dense(ours, dense, Progress(quiet=True), torch.float32)
    plain = greedy(dense)
    adapter = write_adapter(dense, tmp_path / "adapter")
    adapted = greedy(dense)
    assert plain != adapted
    flags = ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules"]
    flags += [f"tuned={adapter}", "--lora-target-modules", *ADAPTED]
    environment = {**cpu_environment(), **bound_to_cores(1)}
    with Server(ours, tmp_path / "log", [*FLAGS, "--dtype", "float32", EAGER, *flags], environment) as server:
        client = OpenAI(base_url=server.url, api_key="none")
        for name, expected in (("tuned", adapted), ("model", plain)):
            reply = client.completions.create(
                model=name, prompt=PROMPTS, max_tokens=NEW_TOKENS, temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )  # fmt: skip
            choices = sorted(reply.choices, key=lambda choice: choice.index)
            assert [getattr(choice, "token_ids", None) for choice in choices] == expected, name

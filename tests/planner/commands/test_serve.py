"""``moeq serve`` refuses what cannot work before vLLM starts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from planner.commands.serve import IMPOSSIBLE, check_flags
from planner.common.units import GIB
from planner.evaluation import server_start
from planner.evaluation.server_start import cache_flags, check_port, check_tokenizer, find_checkpoint
from tests.conftest import Outcome, one_line
from vllm_moeq.format import UsageError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--enable-eplb"], "--enable-eplb: experts of different widths"),
        (["--enable_eplb"], "--enable-eplb: experts of different widths"),
        (["--enable-lora", "--port", "1"], "--enable-lora: adapters cannot"),
        (["--port", "1", "--model", "other"], "--model: DIR is the model"),
        (["--quantization", "awq"], "--quantization: expected moeq, which config.json names, found awq"),
        (["--quantization=gptq"], "found gptq"),
        (["-q"], "-q: expected moeq"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_flags(flags)


def test_other_flags_pass() -> None:
    check_flags(["--quantization", "moeq", "--max-model-len", "64", "--enable-expert-parallel", "-tp=2"])


def test_the_plugin_gives_the_same_reasons() -> None:
    options = pytest.importorskip("vllm_moeq.serving.options")
    reasons = {option.flag: option.reason for option in options.OPTIONS}
    assert {flag: reasons[flag] for flag in IMPOSSIBLE if flag != "--model"}.items() <= IMPOSSIBLE.items()


def test_a_taken_port_is_named_with_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        for arguments in (["--port", port], [f"--port={port}", "--host", "127.0.0.1"]):
            with pytest.raises(UsageError, match=rf"--port: expected a free port, found {port} in use .* \d+ is free"):
                check_port(arguments)
    check_port(["--port", port])


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(server_start, "available_bytes", lambda _: 7 * GIB)
    monkeypatch.delenv(server_start.CACHE_VARIABLE, raising=False)


def shard(folder: Path, count: int) -> None:
    """Make a sparse file."""
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(count)


@pytest.mark.usefixtures("on_a_cpu")
def test_the_cache_gets_half_of_what_weights_leave(tmp_path: Path) -> None:
    shard(tmp_path, 2 * GIB)
    assert cache_flags(tmp_path, []) == ["--kv-cache-memory-bytes", str(GIB)]
    assert cache_flags(tmp_path, ["-tp", "2"]) == ["--kv-cache-memory-bytes", str(GIB // 2)]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("own", [["--gpu-memory-utilization", "0.001"], ["--kv-cache-memory-bytes=1G"]])
def test_the_users_word_on_memory_counts(own: list[str], tmp_path: Path) -> None:
    shard(tmp_path, 9 * GIB)
    assert cache_flags(tmp_path, own) == []


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("own", "space", "message"),
    [
        (["--gpu-memory-utilization", "1.0"], "", "--gpu-memory-utilization: expected at most 0\\..*, found 1.0"),
        (["--kv-cache-memory-bytes", str(8 * GIB)], "", "--kv-cache-memory-bytes: expected less than the 7.00 GiB"),
        ([], "8", "VLLM_CPU_KVCACHE_SPACE: expected less than the 7.00 GiB of free memory, found 8.00 GiB"),
        ([], "", "expected 12.00 GiB of free memory for weights and vLLM, found 7.00 GiB"),
    ],
)
def test_too_little_memory_is_found_before_the_start(
    own: list[str], space: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(tmp_path, 9 * GIB)
    monkeypatch.setenv(server_start.CACHE_VARIABLE, space)
    with pytest.raises(UsageError, match=message):
        cache_flags(tmp_path, own)


def test_a_checkpoint_without_a_tokenizer(moeq: Callable[..., Outcome], quantized_mixtral: Path) -> None:
    assert not (quantized_mixtral / "tokenizer.json").exists()
    assert "expected a tokenizer, such as tokenizer.json, found none" in one_line(moeq("serve", quantized_mixtral))
    check_tokenizer(quantized_mixtral, ["--tokenizer", "elsewhere"])
    check_tokenizer(quantized_mixtral, ["--skip-tokenizer-init"])


def test_a_checkpoint_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that vLLM reads say which revision is taken, and from which cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    where = ["--download-dir", str(tmp_path)]
    assert find_checkpoint("owner/name", [*where, "--revision", "0" * 40]) == snapshot
    for name, flags in (("owner/name", where), ("owner/other", where), ("./name", [])):
        with pytest.raises(UsageError, match=name):
            find_checkpoint(name, flags)


def test_a_refusal_is_one_line(moeq: Callable[..., Outcome], quantized_mixtral: Path) -> None:
    assert "--enable-eplb" in one_line(moeq("serve", quantized_mixtral, "--enable-eplb"))

"""``moeq serve`` refuses what cannot work before vLLM starts."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.commands.serve import IMPOSSIBLE, check_flags, check_tensor_parallel
from planner.common.units import GIB
from planner.evaluation import server_start
from planner.evaluation.server_start import cache_flags, chat_note, check_port, check_tokenizer, find_checkpoint
from tests.conftest import Outcome, one_line
from tests.folders import save_byte_tokenizer
from tests.paths import MIXTRAL
from vllm_moeq.format import UsageError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--enable-eplb"], "--enable-eplb: experts of different widths"),
        (["--enable_eplb"], "--enable-eplb: experts of different widths"),
        (["--enable-eplb", "--port", "1"], "--enable-eplb: experts of different widths"),
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


@pytest.mark.parametrize("flags", [("--tensor-parallel-size", "8"), ("-tp=8",), ("--tensor_parallel_size=8",)])
def test_ranks_that_experts_cannot_be_cut_for(flags: tuple[str, ...], quantized_mixtral: Path) -> None:
    with pytest.raises(UsageError, match=r"experts: expected 1 or 2 or 4 as the number of ranks, .* 128, found 8"):
        check_tensor_parallel(quantized_mixtral, flags)


@pytest.mark.parametrize("flags", [("-tp", "4"), ("-tp", "8", "-ep"), ("-tp", "8", "--enable-expert-parallel"), ()])
def test_ranks_that_fit(flags: tuple[str, ...], quantized_mixtral: Path) -> None:
    check_tensor_parallel(quantized_mixtral, flags)


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "9" * 5000])
def test_what_is_no_number_of_ranks_is_left_to_vllm(value: str, quantized_mixtral: Path) -> None:
    check_tensor_parallel(quantized_mixtral, ("-tp", value))


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
    monkeypatch.setattr(server_start, "node_available_bytes", lambda: None)
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
@pytest.mark.parametrize(
    ("node", "ranks", "cache"),
    [(6 * GIB, 1, GIB // 2), (100 * GIB, 1, GIB), (6 * GIB, 2, GIB // 2), (5 * GIB, 2, GIB // 2), (4 * GIB, 1, GIB)],
)
def test_the_cache_fits_in_a_node_of_memory(
    node: int, ranks: int, cache: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_start, "node_available_bytes", lambda: node)
    shard(tmp_path, 2 * GIB)
    assert cache_flags(tmp_path, ["-tp", str(ranks)]) == ["--kv-cache-memory-bytes", str(cache)]


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


@pytest.mark.slow
def test_a_token_without_an_embedding(moeq: Callable[..., Outcome], quantized_copy: Path) -> None:
    shutil.copy(MIXTRAL / "tokenizer.json", quantized_copy)  # 2048 tokens for 256 embeddings
    assert "tokenizer: expected numbers below 256, the model's vocab_size" in one_line(moeq("serve", quantized_copy))


def test_a_checkpoint_without_a_tokenizer(moeq: Callable[..., Outcome], quantized_mixtral: Path) -> None:
    assert not (quantized_mixtral / "tokenizer.json").exists()
    assert "expected a tokenizer, such as tokenizer.json, found none" in one_line(moeq("serve", quantized_mixtral))
    check_tokenizer(quantized_mixtral, ["--tokenizer", "elsewhere"])
    check_tokenizer(quantized_mixtral, ["--skip-tokenizer-init"])


def tokenizer_with(template: str | None, folder: Path) -> Any:
    """Return the shipped model's tokenizer from a folder, with a chat template of its own or none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MIXTRAL / name, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return check_tokenizer(folder, [])


def test_a_model_without_a_chat_template_is_named_at_the_start(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None, tmp_path)
    note = chat_note(tmp_path, tokenizer, ["--port", "8001"])
    assert note is not None
    assert note.startswith(f"note: {tmp_path} has no chat template")
    assert "--chat-template FILE" in note
    for flags in (["--chat-template", "mine.jinja"], ["--chat_template=mine.jinja"], ["--tokenizer-mode", "mistral"]):
        assert chat_note(tmp_path, tokenizer, flags) is None
    assert chat_note(tmp_path, None, []) is None
    (tmp_path / "chat_template.json").write_text("{}")
    assert chat_note(tmp_path, tokenizer, []) is None


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_note_comes_before_the_server(moeq: Callable[..., Outcome], quantized_copy: Path) -> None:
    save_byte_tokenizer(quantized_copy)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        outcome = moeq("serve", quantized_copy, "--port", listening.getsockname()[1])
    assert "expected a free port" in one_line(outcome, "note: ")
    assert " has no chat template: " in outcome.err


def test_a_model_with_a_chat_template_needs_no_note(tmp_path: Path) -> None:
    assert chat_note(tmp_path, tokenizer_with("{{ messages }}", tmp_path), []) is None


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

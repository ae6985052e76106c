"""The check before the first expert is copied, for folders and for names on the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moeq.format import CheckpointError, MoeqError, load_config
from vllm_moeq.serving.checkpoint import Checkpoint

NAME = "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed"


@pytest.fixture
def cache(quantized_copy: Path, tmp_path: Path) -> Path:
    """A cache of the Hub with the checkpoint as owner/name."""
    repository = tmp_path / "cache" / "models--owner--name"
    for folder in ("snapshots/0123", "blobs", "refs"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    for number, path in enumerate(sorted(quantized_copy.iterdir())):
        shutil.move(path, repository / "blobs" / str(number))
        (repository / "snapshots" / "0123" / path.name).symlink_to(Path("../../blobs") / str(number))
    return tmp_path / "cache"


def test_a_name_on_the_hub_whose_files_are_here(cache: Path) -> None:
    checkpoint = Checkpoint("owner/name", cache=str(cache))
    summary = checkpoint.check()
    assert summary is not None
    assert summary.experts == 16
    assert "snapshots/0123/model-0000" in checkpoint.place(NAME)
    assert checkpoint.place("unknown") == "tensor unknown"


def test_a_damaged_one_is_refused(cache: Path) -> None:
    (cache / "models--owner--name" / "snapshots" / "0123" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        Checkpoint("owner/name", cache=str(cache)).check()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight_packed"])
def test_one_without_a_tensor_that_is_no_experts_is_refused(
    name: str, quantized_copy: Path, change_tensor: Callable[..., Any]
) -> None:
    change_tensor(quantized_copy, name, None)
    with pytest.raises(CheckpointError, match=f"{name.removesuffix('_packed')} is missing"):
        Checkpoint(str(quantized_copy)).check()


@pytest.mark.parametrize("model", ["owner/other", "../x", "a/b/c"])
def test_files_that_are_not_here_are_not_checked(model: str, cache: Path) -> None:
    checkpoint = Checkpoint(model, cache=str(cache))
    assert checkpoint.check() is None
    assert checkpoint.place(NAME) == f"tensor {NAME}"


def test_a_folder_is_read_once(quantized_copy: Path) -> None:
    checkpoint = Checkpoint(str(quantized_copy))
    first = checkpoint.check()
    (quantized_copy / "config.json").unlink()
    assert checkpoint.check() is first
    with pytest.raises(MoeqError):
        Checkpoint(str(quantized_copy)).check()


def test_vllms_configuration_remembers_name_and_cache(
    quantized_mixtral: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft of a speculative pair is not what ``--model`` names."""
    config = pytest.importorskip("vllm_moeq.serving.config")
    plugin = config.MoeqQuantizationConfig(load_config(quantized_mixtral))
    assert plugin._loaded_from() is None
    plugin.maybe_update_config("owner/name", revision="main")
    load = SimpleNamespace(load_config=SimpleNamespace(download_dir=str(cache)))
    monkeypatch.setattr(config, "get_current_vllm_config", lambda: load)
    assert plugin._loaded_from().check().experts == 16

"""What ``moeq quantize --mtp`` makes of layers for speculative decoding."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Outcome, one_line
from tests.speculative import LAYER, build_with_mtp
from vllm_moeq.completeness import verify_whole
from vllm_moeq.format import CheckpointError, ShardSet, load_config

pytestmark = pytest.mark.slow

START = f"model.layers.{LAYER}."
ARGUMENTS = ("--avg-bits", "3", "--bits", "2,3,4", "--group-size", "32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_with_mtp("glm4_moe", tmp_path_factory.mktemp("mtp") / "source")


@pytest.fixture
def kept(source: Path, tmp_path: Path, moeq: Callable[..., Outcome]) -> Path:
    made = moeq("quantize", source, *ARGUMENTS, "--mtp", "keep", "-o", tmp_path / "kept")
    assert made.code == 0, made.err
    assert "note: layers for speculative decoding stay in 16 bits: " in made.err
    return tmp_path / "kept"


def behind(folder: Path) -> dict[str, torch.Tensor]:
    with ShardSet(folder) as shards:
        return {name: shards.load(name) for name in shards.tensors if name.startswith(START)}


def count(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"])


def test_kept_layers_are_the_sources(source: Path, kept: Path, tmp_path: Path, moeq: Callable[..., Outcome]) -> None:
    """The dense export has them too: no experts of the plan are among them."""
    theirs = behind(source)
    assert moeq("export", kept, "-o", tmp_path / "dense").code == 0
    for folder in (kept, tmp_path / "dense"):
        found = behind(folder)
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[name], theirs[name]) for name in theirs)
        assert count(folder) == 1
    config = load_config(kept)
    assert not any(prefix.startswith(START) for prefix in config.experts)
    assert f"{START}self_attn.q_proj" in config.unquantized
    assert moeq("verify", kept).code == 0


def test_sizes_count_kept_layers(source: Path, tmp_path: Path, moeq: Callable[..., Outcome]) -> None:
    sizes = {}
    for mtp in ("drop", "keep"):
        made = moeq("quantize", source, *ARGUMENTS, "--mtp", mtp, "--dry-run", "--json", "-o", tmp_path / "out")
        assert made.code == 0, made.err
        sizes[mtp] = int(json.loads(made.out)["sizes"]["total_bytes"])
    assert sizes["keep"] - sizes["drop"] == sum(it.nbytes for it in behind(source).values())


def test_by_default_they_are_dropped(source: Path, tmp_path: Path, moeq: Callable[..., Outcome]) -> None:
    made = moeq("quantize", source, *ARGUMENTS, "-o", tmp_path / "out")
    assert "of layers for speculative decoding are left out" in made.err
    assert count(tmp_path / "out") == len(behind(tmp_path / "out")) == 0


def test_what_cannot_be_kept_is_refused(mixtral_copy: Path, tmp_path: Path, moeq: Callable[..., Outcome]) -> None:
    refused = moeq("quantize", mixtral_copy, "--avg-bits", "2", "--mtp", "keep", "-o", tmp_path / "out")
    assert "--mtp keep: expected layers for speculative decoding" in one_line(refused)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("announced", "message"),
    [(0, "expected no such tensor"), (2, "expected the tensors of 2 layers .* found 1")],
)
def test_a_count_that_files_do_not_have_is_refused(
    announced: int,
    message: str,
    kept: Path,
    change_config: Callable[[Path, Callable[[dict[str, Any]], None]], None],
) -> None:
    change_config(kept, lambda it: it.update(num_nextn_predict_layers=announced))
    with pytest.raises(CheckpointError, match=message):
        verify_whole(kept, values=False)


@pytest.mark.parametrize(
    ("leaf", "gap"),
    [
        ("eh_proj.weight", "eh_proj"),
        ("mlp.experts.1.up_proj.weight", "mlp.experts.1.up_proj.weight"),
    ],
)
def test_a_layer_that_lacks_a_tensor_is_refused(
    leaf: str, gap: str, source: Path, kept: Path, tmp_path: Path, moeq: Callable[..., Outcome]
) -> None:
    """vLLM would draft with random weights: neither is such a layer kept, nor is such a checkpoint valid."""
    torn = tmp_path / "torn"
    torn.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            (torn / name).write_bytes((source / name).read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors[START + leaf]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    message = one_line(moeq("quantize", torn, *ARGUMENTS, "--mtp", "keep", "-o", tmp_path / "out"))
    assert f"--mtp keep: {torn}: expected {START}{gap}, found none" in message
    assert moeq("quantize", torn, *ARGUMENTS, "-o", tmp_path / "out").code == 0
    found = next(path for path in kept.glob("*.safetensors") if START + leaf in load_file(path))
    left = {name: tensor for name, tensor in load_file(found).items() if name != START + leaf}
    save_file(left, found, metadata={"format": "pt"})
    index = kept / "model.safetensors.index.json"
    if index.exists():
        read = json.loads(index.read_text())
        del read["weight_map"][START + leaf]
        index.write_text(json.dumps(read))
    with pytest.raises(CheckpointError, match=re.escape(f"expected {START}{gap} in a layer")):
        verify_whole(kept)

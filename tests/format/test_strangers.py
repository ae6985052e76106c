"""What vLLM and transformers would read in a folder is what was checked, or the folder is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_moeq.format import CheckpointError, MoeqError, ShardSet, verify
from vllm_moeq.format.strangers import FILES, KEYS, METHODS, NOT_ALONE, refuse_files, refuse_keys, without_strangers

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "mistral", "fastsafetensors")
NAMES = (
    "consolidated.safetensors", "consolidated.00.safetensors", "extra.safetensors", "pytorch_model.bin", "weights.pt",
    "consolidated.00.pt", "a.bin", "training_args.bin",
)  # fmt: skip


def read_by_vllm(folder: Path, load_format: str) -> set[str]:
    """Return the names of the files from which vLLM would load weights."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig(load_format=load_format))
    try:
        found = loader._prepare_weights(str(folder), None, None, True, None)
    except RuntimeError:
        return set()  # it finds no weights of this format
    return {Path(name).name for name in found[1]}


@pytest.mark.parametrize("load_format", LOAD_FORMATS)
def test_of_a_checkpoint_vllm_reads_the_shards(load_format: str, quantized_mixtral: Path) -> None:
    with ShardSet(quantized_mixtral) as shards:
        assert read_by_vllm(quantized_mixtral, load_format) <= set(shards.files)


def test_what_vllm_would_read_instead_is_refused(quantized_copy: Path) -> None:
    with ShardSet(quantized_copy) as shards:
        ours = shards.files
    preferred = set()
    for name in NAMES:
        shutil.copyfile(next(quantized_copy.glob("model-*.safetensors")), quantized_copy / name)
        if any(name in read_by_vllm(quantized_copy, load_format) for load_format in LOAD_FORMATS):
            preferred.add(name)
        with pytest.raises(CheckpointError, match=f"{name}: expected no such file"):
            refuse_files(quantized_copy, ours)
        (quantized_copy / name).unlink()
    assert "consolidated.safetensors" in preferred  # so vLLM was asked, and answered
    assert "weights.pt" in preferred


def test_the_only_shard_of_an_index_may_be_the_file_that_readers_prefer(tmp_path: Path) -> None:
    index = "model.safetensors.index.json"
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse_files(tmp_path, [index, "model.safetensors"])
    for shard in ("consolidated.safetensors", ".hidden.safetensors"):
        (tmp_path / shard).write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"{shard}: expected no such file"):
            refuse_files(tmp_path, [index, shard])
        (tmp_path / shard).unlink()


@pytest.mark.parametrize(
    "name", ["original/consolidated.00.pth", "custom_generate/generate.py", "adapter/adapter_config.json"]
)
def test_weights_and_code_in_a_folder_within(name: str, quantized_copy: Path) -> None:
    (quantized_copy / name).parent.mkdir()
    (quantized_copy / name).write_bytes(b"x")
    with ShardSet(quantized_copy) as shards, pytest.raises(CheckpointError, match=f"{name}: expected no weights"):
        refuse_files(quantized_copy, shards.files)


def test_names_that_transformers_knows_are_ours_or_refused(quantized_copy: Path) -> None:
    from transformers import utils

    known = {getattr(utils, name) for name in dir(utils) if name.endswith(("WEIGHTS_NAME", "WEIGHTS_INDEX_NAME"))}
    assert {"model.safetensors", "pytorch_model.bin"} <= known
    with ShardSet(quantized_copy) as shards:
        ours = shards.files
    for name in known - set(ours):
        (quantized_copy / name).write_bytes(b"{}")
        with pytest.raises(CheckpointError, match=f"{name}: expected no such file"):
            refuse_files(quantized_copy, ours)
        (quantized_copy / name).unlink()


def test_what_a_checkpoint_has_is_no_stranger(quantized_copy: Path) -> None:
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "report.html",
        "evaluation.json",
        "LICENSE",
        ".gitattributes",
    ):
        (quantized_copy / name).write_text("x")
    assert verify(quantized_copy).experts == 16


@pytest.mark.parametrize("pattern", FILES)
def test_every_pattern_is_refused_in_any_case(pattern: str, quantized_copy: Path) -> None:
    name = pattern.replace("*", "A").upper()
    (quantized_copy / name).write_bytes(b"")
    with pytest.raises(MoeqError, match=f"{name}: expected no such file"):
        verify(quantized_copy)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("parts", [(), ("text_config",), ("vision_config", "inner")])
def test_keys_are_refused_anywhere_and_left_out_by_the_writer(key: str, parts: tuple[str, ...]) -> None:
    config: dict[str, Any] = {"model_type": "x", "quantization_config": {"quant_method": "moeq"}}
    inner: Any = config
    for part in parts:
        inner = inner.setdefault(part, {"kept": 1})
    inner[key] = "evil"
    with pytest.raises(MoeqError, match=rf"config\.json: {'.'.join((*parts, key))}: expected no such key"):
        refuse_keys(config, Path("config.json"))
    clean = without_strangers(config)
    refuse_keys(clean, Path("config.json"))
    assert clean["quantization_config"] == config["quantization_config"]
    assert not parts or clean[parts[0]]["kept"] == 1


def test_the_name_of_no_weights_is_taken_at_the_top_alone() -> None:
    refuse_keys(dict(NOT_ALONE), Path("config.json"))
    for key, value in NOT_ALONE.items():
        assert not value.endswith((".safetensors", ".json", ".bin"))
        for config in ({"text_config": {key: value}}, {key: f"{value} "}, {key: None}):
            with pytest.raises(MoeqError, match=f"{key}: expected no such key"):
                refuse_keys(config, Path("config.json"))
    assert without_strangers(NOT_ALONE) == {}


def test_a_second_quantization_is_refused() -> None:
    config = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    with pytest.raises(MoeqError, match=r"text_config\.quantization_config: expected no such key"):
        refuse_keys(config, Path("config.json"))
    assert without_strangers(config) == {"text_config": {}}


def test_no_key_takes_the_place_of_a_method() -> None:
    from transformers import PreTrainedConfig

    methods = {name for name in dir(PreTrainedConfig) if callable(getattr(PreTrainedConfig, name))}
    assert {name for name in methods if not name.startswith("__")} <= set(METHODS)
    for name in methods:
        with pytest.raises(MoeqError, match=rf"{name}: expected no such key, found the name of a method"):
            refuse_keys({name: 1}, Path("config.json"))
    assert without_strangers(dict.fromkeys(METHODS, 1)) == {}

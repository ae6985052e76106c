from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_moeq.format import CheckpointError, ConfigError, MoeqError, ShardSet, read_json

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with three tensors and their index."""
    save_file({"one": torch.arange(6, dtype=torch.int32).reshape(2, 3), "two": torch.ones(4)}, tmp_path / A)
    save_file({"three": torch.full((2, 2), 3.0, dtype=torch.bfloat16)}, tmp_path / B)
    write_index(tmp_path, {"one": A, "two": A, "three": B})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path, kind: type[MoeqError]) -> str:
    with pytest.raises(kind) as error:
        ShardSet(folder)
    return str(error.value)


def test_headers_tell_shape_and_dtype(folder: Path) -> None:
    info = ShardSet(folder).info("one")
    assert (info.shard, info.shape, info.dtype, info.numel, info.nbytes) == (A, (2, 3), torch.int32, 6, 24)


def test_tensors_load_by_name(folder: Path) -> None:
    with ShardSet(folder) as shards:
        assert torch.equal(shards.load("three"), torch.full((2, 2), 3.0, dtype=torch.bfloat16))


def test_tensors_load_again_after_close(folder: Path) -> None:
    shards = ShardSet(folder)
    shards.close()
    assert torch.equal(shards.load("two"), torch.ones(4))


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"one": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(ShardSet(tmp_path).tensors) == ["one"]


@pytest.mark.parametrize("kind", ["info", "load"])
def test_a_missing_tensor_is_named(folder: Path, kind: str) -> None:
    shards = ShardSet(folder)
    with pytest.raises(CheckpointError, match="tensor four is missing"):
        getattr(shards, kind)("four")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", "", 1, None, [A]]
)
def test_only_plain_shard_names_are_opened(folder: Path, shard: object) -> None:
    write_index(folder, {"one": shard})
    message = refusal(folder, ConfigError)
    assert "index.json" in message
    assert "tensor one: expected a plain shard file name" in message


def test_a_traversal_is_refused_even_if_the_file_exists(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    write_index(inner, {"one": f"../{A}"})
    assert "plain shard file name" in refusal(inner, ConfigError)


@pytest.mark.parametrize("weight_map", [{}, [], None, "x", {"one": 2}])
def test_an_index_without_a_map_is_refused(folder: Path, weight_map: object) -> None:
    write_index(folder, weight_map)
    assert "model.safetensors.index.json" in refusal(folder, ConfigError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"weight_map": {"a": ', "[" * 100_000])
def test_a_damaged_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(folder, ConfigError)


def test_an_index_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(b"\xff\xfe\x00\x01")
    assert "not valid JSON" in refusal(folder, ConfigError)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / B).unlink()
    assert str(folder / B) in refusal(folder, CheckpointError)


def test_a_folder_in_place_of_a_shard_is_refused(folder: Path) -> None:
    (folder / B).unlink()
    (folder / B).mkdir()
    assert str(folder / B) in refusal(folder, CheckpointError)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_shard_is_named(folder: Path, keep: int) -> None:
    content = (folder / A).read_bytes()
    (folder / A).write_bytes(content[:keep])
    message = refusal(folder, CheckpointError)
    assert f"{folder / A}: damaged or truncated shard" in message
    assert "\n" not in message


def test_a_shard_with_trailing_bytes_is_refused(folder: Path) -> None:
    with (folder / A).open("ab") as file:
        file.write(b"more")
    assert str(folder / A) in refusal(folder, CheckpointError)


def test_a_header_that_claims_a_huge_size_is_refused(folder: Path) -> None:
    (folder / A).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    assert str(folder / A) in refusal(folder, CheckpointError)


def test_a_tensor_that_only_the_index_has_is_named(folder: Path) -> None:
    write_index(folder, {"one": A, "two": A, "three": B, "four": B})
    assert f"{folder / B}: tensor four is in the index but not in the file" in refusal(folder, CheckpointError)


def test_an_index_that_points_to_the_wrong_shard_is_refused(folder: Path) -> None:
    write_index(folder, {"one": B, "two": A, "three": B})
    assert f"{folder / B}: tensor one is in the index" in refusal(folder, CheckpointError)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    save_file({"three": torch.ones(1), "one": torch.ones(1)}, folder / B)
    assert f"tensor one is also in {A}" in refusal(folder, CheckpointError)


def test_an_unsupported_dtype_is_refused(folder: Path) -> None:
    save_file({"three": torch.ones(2, dtype=torch.complex64)}, folder / B)
    assert "tensor three has unsupported dtype" in refusal(folder, CheckpointError)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "expected model.safetensors" in refusal(tmp_path, CheckpointError)


def test_read_json_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_json(tmp_path / "none.json")


def test_read_json_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found a folder"):
        read_json(tmp_path)


def test_read_json_refuses_a_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ConfigError, match="at most"):
        read_json(path)


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "at an odd place"])
def test_maps_and_rows_are_the_tensors(folder: Path, odd: bool) -> None:
    if odd:
        content = (folder / A).read_bytes()
        size = int.from_bytes(content[:8], "little")
        (folder / A).write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
    with ShardSet(folder) as shards:
        for name in ("one", "two", "three"):
            expected = shards.load(name).clone()
            assert torch.equal(shards.map(name), expected)
            assert torch.equal(shards.read_rows(name, 0, len(expected)), expected)
            assert torch.equal(shards.read_rows(name, 1, 2), expected[1:2])


def test_a_map_outlives_its_shards_and_does_not_write(folder: Path) -> None:
    before = (folder / A).read_bytes()
    with ShardSet(folder) as shards:
        two = shards.map("two")
    two.fill_(7)
    assert torch.equal(two, torch.full((4,), 7.0))
    assert (folder / A).read_bytes() == before


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    with ShardSet(folder) as shards:
        (folder / B).write_bytes((folder / B).read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="cannot read tensor three"):
            shards.read_rows("three", 0, 2)
        with pytest.raises(CheckpointError, match="cannot read tensor three"):
            shards.map("three")


def test_a_path_that_is_no_utf8_is_refused_for_that_reason(quantized_mixtral: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(quantized_mixtral, folder)
    with pytest.raises(CheckpointError, match="expected a path in UTF-8"):
        ShardSet(folder)

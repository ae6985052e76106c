"""Texts of headers and of the index are in memory once, and metadata is counted without another text of it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from vllm_moeq.format import CheckpointError
from vllm_moeq.format.files import MAX_WIDE_BYTES
from vllm_moeq.format.headers import read_header
from vllm_moeq.format.index import index_shards


def written(path: Path, header: Any) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_long_metadata_takes_two_texts_and_no_more(tmp_path: Path) -> None:
    size = 20 << 20
    path = written(tmp_path / "a.safetensors", {"__metadata__": {"a": "x" * size}})
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="__metadata__: expected at most 1048576 characters"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * size


def test_a_wide_header_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"__metadata__": {"a": "\N{GRINNING FACE}" + "x" * MAX_WIDE_BYTES}})
    with pytest.raises(CheckpointError, match="a header that is not all ASCII"):
        read_header(path)


@pytest.mark.parametrize("metadata", [[1], {"a": 1}, {"a": {"b": "c"}}, "text", 7, None, {}, {"format": "pt"}], ids=str)
def test_metadata_is_an_object_of_texts(metadata: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"__metadata__": metadata})
    if metadata in (None, {}, {"format": "pt"}):
        assert read_header(path) == {}
    else:
        with pytest.raises(CheckpointError, match="__metadata__: expected an object of texts"):
            read_header(path)


def test_metadata_of_many_levels_is_refused(tmp_path: Path) -> None:
    nested = b'{"__metadata__":' + b'{"a":' * 900 + b"1" + b"}" * 901
    with pytest.raises(CheckpointError):
        read_header(written(tmp_path / "a.safetensors", nested))


def test_a_shard_s_name_is_in_memory_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    shards = ("a.safetensors", "b.safetensors")
    path.write_text(json.dumps({"weight_map": {f"t{number}": shards[number % 2] for number in range(1000)}}))
    found = index_shards(path)
    assert len(found) == 1000
    assert {found[f"t{number}"] for number in (0, 1)} == set(shards)
    assert len(set(map(id, found.values()))) == 2

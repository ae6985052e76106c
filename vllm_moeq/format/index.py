"""Read the index of an untrusted checkpoint: which shard has which tensor."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from vllm_moeq.format.errors import ConfigError
from vllm_moeq.format.files import (
    MAX_JSON_BYTES,
    check_inside,
    invalid_json,
    is_deep,
    json_text,
    no_collection,
    read_bytes,
)
from vllm_moeq.format.headers import MAX_TENSORS, check_name
from vllm_moeq.format.walk import Walk

MAX_METADATA = 1 << 16
"""Characters of any value besides the shards' names."""

MAX_SHARDS = 4_000
METADATA = "metadata"
WEIGHT_MAP = "weight_map"


def index_shards(path: Path, most: int = 4 * MAX_TENSORS, *, ours: bool = False) -> dict[str, str]:
    """Read an index.

    Args:
        path: ``model.safetensors.index.json``.
        most: largest number of tensors.
        ours: whether it is a moeq checkpoint's. Then it must have an object ``metadata``: transformers reads it.

    Returns:
        Every tensor's name, and the file name of its shard.

    Raises:
        ConfigError: the file is missing or damaged, a name stands twice, or a shard's name is not plain.
        CheckpointError: a tensor's name cannot be shown, or the file is a link that leads out of its folder.
    """
    check_inside(path)
    if not path.exists():
        raise ConfigError(f"{path}: expected a JSON file, found no file")
    found: dict[str, str] = {}
    plain: dict[str, str] = {}
    with invalid_json(str(path)), no_collection():
        for name, shard in _entries(path, found, ours=ours):
            check_name(name, path)
            if not isinstance(shard, str) or (shard not in plain and not _is_plain(shard)):
                raise ConfigError(f"{path}: tensor {name}: expected a plain shard file name, found {shard!r:.80}")
            found[name] = plain.setdefault(shard, shard)  # one text per shard, not one per tensor
            if len(found) > most:
                raise ConfigError(f"{path}: expected at most {most} tensors")
            if len(plain) > MAX_SHARDS:
                raise ConfigError(f"{path}: expected at most {MAX_SHARDS} shards")
    if not found:
        raise ConfigError(f"{path}: expected an object '{WEIGHT_MAP}' with the shard of every tensor")
    return found


def _is_plain(shard: str) -> bool:
    plain = shard.endswith(".safetensors") and Path(shard).name == shard
    return plain and len(shard) <= 255 and shard.isprintable()


def _entries(path: Path, known: Container[str], *, ours: bool) -> Iterator[tuple[str, Any]]:
    """Yield what the index's map says of every tensor, which the caller adds to the known ones."""
    walk = Walk(json_text(read_bytes(path, MAX_JSON_BYTES), str(path)))
    keys, has_metadata = set[str](), False
    if walk.begins("{"):
        for key in walk.keys(keys):
            keys.add(key)
            if key == WEIGHT_MAP and walk.begins("{"):
                for name in walk.keys(known):
                    yield name, walk.value()
            else:
                value = walk.short_value(MAX_METADATA)
                if is_deep(value):
                    raise RecursionError
                has_metadata |= isinstance(value, dict) and key == METADATA
    else:
        walk.value()
    walk.end()
    if ours and WEIGHT_MAP in keys and not has_metadata:
        raise ConfigError(f"{path}: expected an object '{METADATA}', which transformers reads, found none")

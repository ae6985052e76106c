"""Source checkpoints: a config, and tensors that are read when they are needed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from planner.model.tensors import SourceTensors
from vllm_moeq.completeness import check_values, positive_integer
from vllm_moeq.format import ConfigError, read_config_json
from vllm_moeq.format.files import check_inside
from vllm_moeq.format.tensors import Tensors

CONFIG = "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json.

    Raises:
        ConfigError: it is missing, damaged or no object, or has a value that no model has.
        CheckpointError: it is a link that leads out of the folder.
    """
    path = folder / CONFIG
    check_inside(path)
    config = read_config_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected an object, found {type(config).__name__}")
    check_values(config, path)
    return config


class SourceModel:
    """A Hugging Face folder: its config.json and its tensors. Tensors are loaded one at a time.

    Args:
        folder: the folder.
        decode: whether encoded weights are decoded; otherwise they are shown as they are stored.

    Raises:
        MoeqError: a missing or damaged config, index or shard; a value in the config that no model has.
    """

    def __init__(self, folder: Path, decode: bool = True) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.shards: Tensors = SourceTensors(folder, self.config, decode=decode)

    def integer(self, *keys: str) -> int:
        """Return the first positive integer under one of ``keys`` in the config, else in its language model's config.

        Raises:
            ConfigError: no key has a positive integer of at most :data:`~vllm_moeq.completeness.MAX_INTEGER`.
        """
        return positive_integer(self.config, keys, self.folder / CONFIG)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(self.shards.stored_bytes(name) for name in self.shards.tensors)

    def hub_name(self) -> tuple[str, str | None]:
        """Return (owner/name, commit) for a model in the Hub's cache, else (folder name, None)."""
        folder = self.folder.resolve()
        repository, snapshots = folder.parent.parent.name, folder.parent.name
        if snapshots == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/"), folder.name
        return folder.name, None

    def fingerprint(self) -> str:
        """Return a digest of the config, the headers (names, shapes, dtypes), file sizes and times.

        Weights are not hashed: that would cost a full read of the model.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in sorted(self.shards.tensors.items()):
            digest.update(f"{name}{info.shard}{info.shape}{info.dtype}".encode())
        for shard in sorted({info.shard for info in self.shards.tensors.values()}):
            status = (self.folder / shard).stat()
            digest.update(f"{shard}{status.st_size}{status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def __enter__(self) -> SourceModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shards.close()

"""Source checkpoints: find, read lazily. Output checkpoints: write atomically, resume."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from planner.model.tensors import SourceShards
from planner.output.files import atomic, reason, sync, write_json, write_tensors
from planner.output.unfinished import PartialRun, check_output
from vllm_moeq.format import NESTED, CheckpointError, ConfigError, ShardSet, UsageError, read_json

__all__ = ["CheckpointWriter", "SourceModel", "check_output", "check_space", "resolve_model"]

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files beside the weights that a server needs."""

NEEDED = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "README.md"]
"""Globs of what is downloaded; a model card names the licence."""

LIGHT = ["config.json", "tokenizer*", "special_tokens_map.json", "generation_config.json", "*.txt"]
"""Globs of what a dry run downloads: sizes and texts, without weights and their index."""

MAX_INTEGER = 1 << 20
"""Largest size that a config.json may name: more would be a damaged file, and long loops."""


def companions(folder: Path) -> list[Path]:
    """Return a model folder's tokenizer, generation settings and chat template."""
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def resolve_model(model: str, weights: bool = True) -> Path:
    """Return the local folder of a model: a path as it is, a Hub name downloaded first.

    Args:
        model: folder or Hub name.
        weights: download them too; without, the folder has them only if they were there before.

    Raises:
        UsageError: neither a folder nor a name that the Hub (or its local cache) has.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(f"{model}: expected a model folder or a Hub name (owner/name), found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=NEEDED if weights else LIGHT))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{model}: no such folder, and the Hub did not have it ({reason})") from None


class SourceModel:
    """A Hugging Face folder: its config.json and its tensors, loaded one at a time.

    Raises:
        MoeqError: a missing or damaged config, index or shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ConfigError(f"{folder / 'config.json'}: expected an object, found {type(config).__name__}")
        self.config: dict[str, Any] = config
        self.shards: ShardSet = SourceShards(folder, config)

    def integer(self, *keys: str) -> int:
        """Return the first of the config's ``keys`` that is there, a positive integer; also its language model's."""
        for part in (self.config, self.config.get(NESTED)):
            found = part if isinstance(part, dict) else {}
            for key in keys:
                value = found.get(key)
                if type(value) is int and 0 < value <= MAX_INTEGER:
                    return value
        path = self.folder / "config.json"
        raise ConfigError(f"{path}: expected a positive integer {' or '.join(keys)} of at most {MAX_INTEGER}")

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(self.shards.stored_bytes(name) for name in self.shards.tensors)

    def hub_name(self) -> tuple[str, str | None]:
        """Return owner/name and commit of a model that lies in the Hub's cache, else the folder's name and None."""
        folder = self.folder.resolve()
        repository, snapshots = folder.parent.parent.name, folder.parent.name
        if snapshots == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/"), folder.name
        return folder.name, None

    def fingerprint(self) -> str:
        """Return a digest of config and headers: names, shapes, dtypes, file sizes and times.

        Contents are not hashed: it would cost a full read of the model.
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


class CheckpointWriter:
    """Writes an output folder so that it appears only when it is complete.

    Shards go to ``<output>.partial`` one by one, each atomically; :meth:`finish` adds the index and
    config.json last and renames the folder. A killed run leaves whole shards only, and the same
    command continues behind them; other settings are refused. An error before the first shard
    leaves nothing.

    Args:
        output: the folder to create.
        fingerprint: everything that decides the contents, under names that a message can show.
        resume: continue an unfinished run; otherwise delete it.

    Raises:
        UsageError: the output exists, its parent does not, another run writes it, an unfinished run
            had another fingerprint, or the partial folder is none of ours.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], resume: bool = True) -> None:
        self.output = output
        self._run = PartialRun(output, fingerprint, resume)
        self.partial = self._run.folder
        self._weight_map: dict[str, str] = {}
        self._bytes: dict[str, int] = {}

    def has_shard(self, shard: str) -> bool:
        """Tell whether a whole shard is there, from this run or an earlier one, and count its tensors if so."""
        path = self.partial / shard
        if not path.is_file():
            return False
        try:
            with safe_open(str(path), framework="pt") as handle:
                names = list(handle.keys())
        except SafetensorError:
            return False  # damaged since: written again
        self._weight_map.update(dict.fromkeys(names, shard))
        self._bytes[shard] = path.stat().st_size
        return True

    def write_shard(self, shard: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard atomically."""
        write_tensors(self.partial / shard, tensors)
        for name in tensors:
            self._weight_map[name] = shard
        self._bytes[shard] = (self.partial / shard).stat().st_size

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer, generation settings and chat template from another model folder."""
        for path in companions(folder):
            with atomic(self.partial / path.name) as temporary:
                shutil.copyfile(path, temporary)

    def finish(
        self, config: Mapping[str, Any], extra: Mapping[str, Any], describe: Callable[[Path], None] | None = None
    ) -> None:
        """Write further JSON files, the index, config.json, and put the folder in its place.

        Args:
            config: contents of config.json.
            extra: file name → contents of further JSON files.
            describe: called with the folder when everything else is in it, to write what is said of it.
        """
        index = {
            "metadata": {"total_size": sum(self._bytes.values())},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        for name, value in extra.items():
            write_json(self.partial / name, value)
        write_json(self.partial / "model.safetensors.index.json", index)
        write_json(self.partial / "config.json", without_code(config))
        if describe is not None:
            describe(self.partial)
        try:
            self.partial.rename(self.output)
        except OSError as error:
            raise CheckpointError(f"{self.output}: cannot rename {self.partial} ({reason(error)})") from None
        # Only now: a run that fails before can still be continued.
        for path in (self.output / "fingerprint.json", self.output / ".lock", *self.output.glob("*.safetensors.json")):
            path.unlink()
        sync(self.output.parent)
        self._run.release()

    def abandon(self) -> None:
        """After an error: keep whole shards for a later run, remove everything else."""
        self._run.abandon()


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without ``auto_map``, which names code that stays behind with the source."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    if isinstance(kept.get(NESTED), dict):
        kept[NESTED] = {key: value for key, value in kept[NESTED].items() if key != "auto_map"}
    return kept


def check_space(output: Path, needed: int) -> None:
    """Refuse to begin when the disk cannot hold ``needed`` bytes (unfinished shards counted).

    Raises:
        CheckpointError: naming the output, the bytes needed and the bytes free.
    """
    partial = output.with_name(f"{output.name}.partial")
    present = sum(path.stat().st_size for path in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed - present:
        raise CheckpointError(
            f"{output}: {os.strerror(errno.ENOSPC)}: {needed - present:,} bytes needed, {free:,} free"
        )

"""Source checkpoints: find, read lazily. Output checkpoints: write atomically, resume."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_moeq.format import CheckpointError, ConfigError, MoeqError, ShardSet, UsageError, read_json

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

MAX_INTEGER = 1 << 20
"""Largest size that a config.json may name: more would be a damaged file, and long loops."""


def resolve_model(model: str) -> Path:
    """Return the local folder of a model: a path as it is, a Hub name downloaded first.

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
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.txt"]))
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
        self.shards = ShardSet(folder)

    def integer(self, *keys: str) -> int:
        """Return the first of the config's ``keys`` that is there, a positive integer."""
        for key in keys:
            value = self.config.get(key)
            if type(value) is int and 0 < value <= MAX_INTEGER:
                return value
        path = self.folder / "config.json"
        raise ConfigError(f"{path}: expected a positive integer {' or '.join(keys)} of at most {MAX_INTEGER}")

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


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sibling temporary file, fsync, rename, directory fsync."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` and put it in place when the block succeeds.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors creates its files with mode 0600
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot write ({_reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointWriter:
    """Writes an output folder so that it appears only when it is complete.

    Shards go to ``<output>.partial`` one by one, each atomically; :meth:`finish` adds the index and
    config.json last and renames the folder. A killed run leaves whole shards only, and the same
    command continues behind them; other settings are refused. An error before the first shard
    leaves nothing.

    Args:
        output: the folder to create.
        fingerprint: everything that decides the contents.

    Raises:
        UsageError: the output exists, its parent does not, another run writes it, or an unfinished
            run had other settings.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self.output = output
        self.partial = output.with_name(f"{output.name}.partial")
        check_output(output)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        try:
            self.partial.mkdir(exist_ok=True)
            self._lock = os.open(self.partial / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise UsageError(f"{self.partial}: cannot write ({_reason(error)})") from None
        try:
            self._claim()
        except MoeqError:
            os.close(self._lock)
            raise
        self._weight_map: dict[str, str] = {}
        self._bytes = 0

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.partial}: another run is writing this output") from None
        for leftover in self.partial.glob(".*.tmp"):
            leftover.unlink()  # of a run that was killed while it wrote
        path = self.partial / "fingerprint.json"
        if path.exists():
            if read_json(path) != self._fingerprint:
                raise UsageError(
                    f"{self.partial}: an unfinished run with another model, plan or settings; "
                    "delete that folder or choose another output"
                )
            return
        try:
            write_json(path, self._fingerprint)
        except MoeqError:
            self._remove_if_empty()
            raise

    def has_shard(self, shard: str) -> bool:
        """Tell whether a previous run finished this shard, and count its tensors if so."""
        path = self.partial / shard
        if not path.is_file():
            return False
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="pt") as handle:
                names = list(handle.keys())
        except SafetensorError:
            return False  # damaged since: written again
        self._weight_map.update(dict.fromkeys(names, shard))
        self._bytes += path.stat().st_size
        return True

    def write_shard(self, shard: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one shard atomically."""
        with atomic(self.partial / shard) as temporary:
            save_file(tensors, str(temporary), metadata={"format": "pt"})
        for name in tensors:
            self._weight_map[name] = shard
        self._bytes += (self.partial / shard).stat().st_size

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer, generation settings and chat template from another model folder."""
        paths = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
        for path in sorted(paths):
            with atomic(self.partial / path.name) as temporary:
                shutil.copyfile(path, temporary)

    def finish(self, config: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Write further JSON files, the index, config.json, and put the folder in its place."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        for name, value in extra.items():
            write_json(self.partial / name, value)
        write_json(self.partial / "model.safetensors.index.json", index)
        write_json(self.partial / "config.json", config)
        try:
            self.partial.rename(self.output)
        except OSError as error:
            raise CheckpointError(f"{self.output}: cannot rename {self.partial} ({_reason(error)})") from None
        # Only now: a run that fails before can still be continued.
        for path in (self.output / "fingerprint.json", self.output / ".lock", *self.output.glob("*.safetensors.json")):
            path.unlink()
        _sync(self.output.parent)
        os.close(self._lock)

    def abandon(self) -> None:
        """After an error: keep whole shards for a later run, remove everything else."""
        self._remove_if_empty()
        os.close(self._lock)

    def _remove_if_empty(self) -> None:
        if not any(self.partial.glob("*.safetensors")):
            shutil.rmtree(self.partial, ignore_errors=True)


def check_output(output: Path) -> None:
    """Refuse an output folder that exists or whose parent cannot be written."""
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output}: the output exists already; choose another or delete it")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{output}: expected the parent folder {parent} to exist")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{output}: the folder {parent} cannot be written")


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

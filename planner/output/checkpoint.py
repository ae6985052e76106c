"""Write output checkpoints shard by shard; they appear only when complete, and a killed run can be continued."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from planner.output.files import atomic, reason, rename_new, sync, write_json, write_tensors
from planner.output.unfinished import PLANNED, PartialRun
from vllm_moeq.format import QUANT_METHOD, CheckpointError, ConfigError
from vllm_moeq.format.files import open_regular
from vllm_moeq.format.strangers import NOT_ALONE, QUANTIZATION, without_strangers

COPIED_AT_ONCE = 1 << 20
"""Bytes of a file that are read and written at a time."""


class CheckpointWriter:
    """Writes an output folder that appears only when it is complete.

    Shards go to ``<output>.partial`` one by one, each atomically. :meth:`finish` adds the index and config.json last
    and renames the folder. A killed run leaves only whole shards. The same command continues after them; other settings
    are refused. An error before the first shard leaves nothing.

    Args:
        output: the folder to create.
        fingerprint: everything that decides the contents, under names that a message can show.
        resume: continue an unfinished run; otherwise delete it.

    Raises:
        UsageError: the output exists, its parent does not, another run writes it, an unfinished run had another
            fingerprint, or the partial folder is not of this program.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], resume: bool = True) -> None:
        self.output = output
        self._run = PartialRun(output, fingerprint, resume)
        self.partial = self._run.folder
        self._weight_map: dict[str, str] = {}
        self._bytes: dict[str, int] = {}

    def has_shard(self, shard: str) -> bool:
        """Tell whether a whole shard is there, from this run or an earlier one; if so, add it to the index."""
        path = self.partial / shard
        if not path.is_file():
            return False
        try:
            with safe_open(str(path), framework="pt") as handle:
                names = list(handle.keys())
        except SafetensorError:
            return False  # damaged: it is written again
        self._weight_map.update(dict.fromkeys(names, shard))
        self._bytes[shard] = path.stat().st_size
        return True

    def write_shard(self, shard: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard atomically."""
        write_tensors(self.partial / shard, tensors)
        for name in tensors:
            self._weight_map[name] = shard
        self._bytes[shard] = (self.partial / shard).stat().st_size

    def copy(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of another folder, given by their names relative to it.

        Raises:
            ConfigError: a file that is no regular one any more, or cannot be read.
            CheckpointError: a full disk.
        """
        for name in names:
            (self.partial / name).parent.mkdir(exist_ok=True)
            _copy(folder / name, self.partial / name)

    def finish(
        self, config: Mapping[str, Any], extra: Mapping[str, Any], describe: Callable[[Path], None] | None = None
    ) -> None:
        """Write the index, config.json and further JSON files, and rename the folder to the output.

        Args:
            config: contents of config.json.
            extra: file name → contents of further JSON files.
            describe: called with the folder when everything else is in it, to write its description.
        """
        index = {
            "metadata": {"total_size": sum(self._bytes.values())},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        for name, value in extra.items():
            write_json(self.partial / name, value)
        write_json(self.partial / "model.safetensors.index.json", index)
        write_json(self.partial / "config.json", _readable(config))
        if describe is not None:
            describe(self.partial)
        try:
            rename_new(self.partial, self.output)
        except FileExistsError:
            raise CheckpointError(
                f"{self.output}: somebody made it while this run went on; the result is kept in {self.partial}: "
                "move the other away and run the same command again"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{self.output}: cannot rename {self.partial} ({reason(error)})") from None
        # Only now, so that a run that fails earlier can still be continued.
        ours = [self.output / name for name in ("fingerprint.json", ".lock")]
        for path in (*ours, *self.output.glob("*.safetensors.json"), *self.output.glob(PLANNED)):
            path.unlink()
        sync(self.output.parent)
        self._run.release()

    def abandon(self) -> None:
        """Keep whole shards for a later run, and remove everything else; call this after an error."""
        self._run.abandon()


def _copy(source: Path, target: Path) -> None:
    """Copy a file atomically; an error names the file that it is about."""
    with open_regular(source) as file, atomic(target) as temporary, temporary.open("wb") as written:
        for part in iter(lambda: _read_part(file, source), b""):
            written.write(part)


def _read_part(file: BinaryIO, source: Path) -> bytes:
    try:
        return file.read(COPIED_AT_ONCE)
    except OSError as error:
        raise ConfigError(f"{source}: cannot read ({reason(error)})") from None


def _readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that leads no reader astray; transformers refuses packed experts if it is alone."""
    packed = config.get(QUANTIZATION, {}).get("quant_method") == QUANT_METHOD
    return {**without_strangers(config), **(NOT_ALONE if packed else {})}


def check_space(output: Path, needed: int) -> None:
    """Check that the disk can hold ``needed`` bytes; shards of an unfinished run count as part of them.

    Raises:
        CheckpointError: it cannot; the message names the output, the bytes needed and the bytes free.
    """
    partial = output.with_name(f"{output.name}.partial")
    present = sum(path.stat().st_size for path in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed - present:
        raise CheckpointError(
            f"{output}: {os.strerror(errno.ENOSPC)}: {needed - present:,} bytes needed, {free:,} free"
        )

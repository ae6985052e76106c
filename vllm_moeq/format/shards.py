"""Read the safetensors shards of a Hugging Face folder without trusting it.

Only headers are read here; tensors come lazily from :meth:`ShardSet.load`, one at a time.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_moeq.format.errors import CheckpointError, ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_JSON_BYTES = 64 << 20
MAX_SHARDS = 10_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor; ``offset`` is the place of its first byte in the file."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.dtype.itemsize


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size.

    Raises:
        ConfigError: the file is missing, too large, not a regular file or not JSON.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: expected a JSON file, found {'no file' if not path.exists() else 'none'}")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, found {size}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None


def _index_shards(path: Path) -> dict[str, str]:
    """Return tensor name → shard file name from an index, refusing anything but plain names."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: expected an object 'weight_map' with the shard of every tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ConfigError(f"{path}: tensor {name}: expected a plain shard file name, found {shard!r}")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise ConfigError(f"{path}: expected at most {MAX_SHARDS} shards")
    return weight_map


class ShardSet:
    """The tensors of a folder: headers in memory, data on demand.

    Args:
        folder: a folder with ``model.safetensors`` or an index and its shards.

    Raises:
        CheckpointError: no weights, a shard that is missing, truncated or damaged, a tensor that the
            index names and its shard lacks, or that stands in two shards.
        ConfigError: a damaged index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        index = folder / INDEX_NAME
        expected: dict[str, str] | None = None
        if index.exists():
            expected = _index_shards(index)
            shards = sorted(set(expected.values()))
        elif (folder / SINGLE_NAME).exists():
            shards = [SINGLE_NAME]
        else:
            raise CheckpointError(f"{folder}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither")
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            self._read_header(shard)
        for name, shard in (expected or {}).items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise CheckpointError(f"{folder / shard}: tensor {name} is in the index but not in the file")

    def _open(self, shard: str) -> Any:
        if shard not in self._handles:
            path = self.folder / shard
            if not path.is_file():
                raise CheckpointError(f"{path}: expected a safetensors shard, found no regular file")
            try:
                self._handles[shard] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                size = path.stat().st_size
                raise CheckpointError(f"{path}: damaged or truncated shard of {size} bytes ({error})") from None
        return self._handles[shard]

    def _read_header(self, shard: str) -> None:
        handle = self._open(shard)
        # The reader has checked that tensors follow each other without holes, behind eight bytes and the header.
        with (self.folder / shard).open("rb") as file:
            offset = 8 + int.from_bytes(file.read(8), "little")
        for name in handle.offset_keys():
            if name in self.tensors:
                raise CheckpointError(f"{self.folder / shard}: tensor {name} is also in {self.tensors[name].shard}")
            view = handle.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{self.folder / shard}: tensor {name} has unsupported dtype {view.get_dtype()}")
            self.tensors[name] = TensorInfo(shard, tuple(view.get_shape()), dtype, offset)
            offset += self.tensors[name].nbytes

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's header entry; raise CheckpointError when it is missing."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]

    def stored_bytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in its file."""
        return self.info(name).nbytes

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, memory-mapped from its shard.

        Raises:
            CheckpointError: the tensor is missing or cannot be read.
        """
        info = self.info(name)
        try:
            tensor: torch.Tensor = self._open(info.shard).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / info.shard}: cannot read tensor {name} ({error})") from None
        return tensor

    def map(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return one tensor in a memory map of its own: unlike those of :meth:`load`, its pages leave memory with it.

        Several threads may map at once. Writing to the tensor does not change the file.

        Args:
            name: of the tensor.
            index: along its first dimension, of the part to map; all of it by default.

        Raises:
            CheckpointError: the tensor is missing or cannot be read.
        """
        info = self.info(name)
        if index is not None:
            part = replace(info, shape=info.shape[1:])
            info = replace(part, offset=info.offset + index * part.nbytes)
        begin = info.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        inside = info.offset - begin
        if inside % info.dtype.itemsize or not info.nbytes:
            whole = self.load(name)
            return (whole if index is None else whole[index]).clone()
        try:
            file = self._descriptor(info.shard)
            area = mmap.mmap(file, inside + info.nbytes, access=mmap.ACCESS_COPY, offset=begin)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / info.shard}: cannot read tensor {name} ({error})") from None
        return torch.frombuffer(area, dtype=info.dtype, offset=inside, count=info.numel).view(info.shape)

    def read_rows(self, name: str, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Return some rows of a matrix, copied from the file: unlike a map, they leave no pages behind.

        Several threads may read at once.

        Args:
            name: a tensor [N, ...].
            begin: first row.
            end: one behind the last row.
            buffer: uint8, where the rows go if they fit: one that is used again costs no page faults.

        Raises:
            CheckpointError: the tensor is missing or cannot be read.
        """
        info = self.info(name)
        shape = (end - begin, *info.shape[1:])
        row_bytes = info.nbytes // max(1, info.shape[0])
        size = row_bytes * (end - begin)
        fits = buffer is not None and buffer.numel() >= size
        target = buffer[:size] if buffer is not None and fits else torch.empty(size, dtype=torch.uint8)
        view, done = target.numpy().data, 0
        try:
            file = self._descriptor(info.shard)
            while done < size:
                count = os.preadv(file, [view[done:]], info.offset + begin * row_bytes + done)
                if count == 0:
                    raise OSError("the file ends before the tensor does")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.folder / info.shard}: cannot read tensor {name} ({error})") from None
        return target.view(info.dtype).view(shape)

    def _descriptor(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.folder / shard, os.O_RDONLY)
            return self._files[shard]

    def close(self) -> None:
        """Release every shard's memory map and file."""
        self._handles.clear()
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""Read the safetensors shards of an untrusted Hugging Face folder.

Opening a folder reads only headers; :meth:`ShardSet.load` reads one tensor at a time.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.files import check_inside
from vllm_moeq.format.headers import DTYPES, MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, read_header
from vllm_moeq.format.index import index_shards
from vllm_moeq.format.tensors import Tensors

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADERS_BYTES = 4 * MAX_HEADER_BYTES
SINGLE_NAME = "model.safetensors"


def _require_utf8(folder: Path) -> None:
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{folder}: expected a path in UTF-8, as safetensors needs, found other bytes") from None


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


class ShardSet(Tensors):
    """The tensors of a folder: headers in memory, data on demand.

    Args:
        folder: a folder with ``model.safetensors``, or with an index and its shards.
        dtypes: the dtypes that its tensors may have, by their names in headers.
        most: largest number of tensors.
        ours: whether it is a moeq checkpoint. Then the index must name every tensor of its shards: vLLM loads the
            others too, transformers does not.

    Raises:
        CheckpointError: there are no weights; a shard is missing, truncated or damaged; or a tensor is in two shards
            or not in the shard that the index names.
        ConfigError: the index is damaged.
    """

    def __init__(
        self,
        folder: Path,
        dtypes: Mapping[str, torch.dtype] = DTYPES,
        *,
        most: int = 4 * MAX_TENSORS,
        ours: bool = False,
    ) -> None:
        self.folder = folder
        self._dtypes = dtypes
        self._most = most
        self._header_bytes = 0
        self._handles: dict[str, Any] = {}
        self._files: dict[str, int] = {}
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()
        _require_utf8(folder)
        index = folder / INDEX_NAME
        expected: dict[str, str] | None = None
        if index.exists():
            expected = index_shards(index, most, ours=ours)
            shards = sorted(set(expected.values()))
        elif (folder / SINGLE_NAME).exists():
            shards = [SINGLE_NAME]
        else:
            raise CheckpointError(f"{folder}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither")
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            self._read_header(shard, expected if ours else None)
        for name, shard in (expected or {}).items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise CheckpointError(f"{folder / shard}: tensor {name} is in the index but not in the file")

    def _open(self, shard: str) -> Any:
        if shard not in self._handles:
            path = self.folder / shard
            self._require_file(path)
            try:
                self._handles[shard] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                size = path.stat().st_size
                raise CheckpointError(f"{path}: damaged or truncated shard of {size} bytes ({error!s:.300})") from None
        return self._handles[shard]

    def _read_header(self, shard: str, known: Container[str] | None) -> None:
        path = self.folder / shard
        self._require_file(path)
        stamp = _stamp(path)
        same = next((other for other, found in self._stamps.items() if found[0] == stamp[0]), None)
        if same is not None:
            raise CheckpointError(f"{path}: expected a file of its own, found the same file as {same}")
        self._stamps[shard] = stamp
        found = read_header(path, self._dtypes, known)
        self._header_bytes += stamp[1] - sum(info.nbytes for info in found.values())
        if self._header_bytes > MAX_HEADERS_BYTES:
            raise CheckpointError(f"{self.folder}: expected at most {MAX_HEADERS_BYTES} bytes of headers in all shards")
        for name, info in found.items():
            if name in self.tensors:
                raise CheckpointError(f"{path}: tensor {name} is also in {self.tensors[name].shard}")
            self.tensors[name] = info
        self._open(shard)
        if len(self.tensors) > self._most:
            raise CheckpointError(f"{self.folder}: expected at most {self._most} tensors in all shards")

    @staticmethod
    def _require_file(path: Path) -> None:
        check_inside(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a safetensors shard, found no regular file")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the shards, and of their index if there is one."""
        index = (INDEX_NAME,) if (self.folder / INDEX_NAME).exists() else ()
        return (*index, *self._stamps)

    def stamps(self) -> dict[str, list[int]]:
        """Return every shard's size and modification time, by which a replaced file is recognized."""
        return {shard: list(stamp[1:]) for shard, stamp in sorted(self._stamps.items())}

    def check_unchanged(self) -> None:
        """Require that every shard is still the file whose header was read.

        Raises:
            CheckpointError: a shard's inode, size or modification time has changed.
        """
        for shard, stamp in self._stamps.items():
            path = self.folder / shard
            if not path.is_file() or _stamp(path) != stamp:
                raise CheckpointError(f"{path}: expected it unchanged since it was opened, found another file")

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
        """Return one tensor in its own memory map.

        Its pages leave memory with the tensor, unlike those of :meth:`load`. Several threads may map at once. Writing
        to the tensor does not change the file.

        Args:
            name: the tensor's name.
            index: the part to map, as an index into the first dimension; None maps the whole tensor.

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
        """Return rows of a matrix, copied from the file: unlike a map, a copy leaves no pages in memory.

        Several threads may read at once.

        Args:
            name: the name of a tensor [N, ...].
            begin: the first row.
            end: one behind the last row.
            buffer: a uint8 buffer for the rows, used if they fit. A reused buffer costs no page faults.

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
        """Close the memory maps and files of all shards."""
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

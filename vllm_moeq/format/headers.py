"""Read safetensors headers within bounds, and check them tensor by tensor, so that errors name the tensor.

The official reader checks the same header again before it returns a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.files import MAX_WIDE_BYTES, no_collection
from vllm_moeq.format.walk import Walk

MAX_HEADER_BYTES = 24 << 20
MAX_TENSORS = 100_000
"""The limit per shard, and a quarter of the limit of a folder, which is twice what a trillion weights usually need."""
MAX_DIMENSIONS = 8
MAX_NAME = 512
MAX_SIZE = 1 << 48
"""The largest number in a header, and the largest product of a tensor's sizes."""
METADATA = "__metadata__"
ENTRY = {"dtype", "shape", "data_offsets"}
"""What a header says of a tensor."""
Entry = tuple[str, int, int, tuple[int, ...], torch.dtype]
MAX_ENTRY = 4096
"""Characters of what a header says of a tensor."""
MAX_METADATA = 1 << 20
"""Characters of a header's metadata, which nobody here reads; the official reader keeps them in memory."""

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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in the header of a shard; ``offset`` is the position of its first byte in the file."""

    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.dtype.itemsize


def check_name(name: str, path: Path) -> None:
    """Refuse a tensor name that an error message cannot show unchanged.

    Raises:
        CheckpointError: the name is too long, or has characters that cannot be printed.
    """
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f"{path}: tensor {name!r:.80}: expected a name of at most {MAX_NAME} characters that can be printed"
        )


def read_header(
    path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES, known: Container[str] | None = None
) -> dict[str, TensorInfo]:
    """Return the tensors of a shard in the order of their bytes.

    Args:
        path: the shard.
        dtypes: the dtypes that it may have, by their names in headers.
        known: the only names that its tensors may have: those of the index.

    Raises:
        CheckpointError: the header is too large or not JSON; a tensor is named twice or is not in the index; a
            tensor's size does not match its shape and dtype, or it does not begin where the previous one ends; or some
            bytes belong to no tensor.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            whole = path.stat().st_size
            if whole < 8 or length > min(MAX_HEADER_BYTES, whole - 8):
                raise CheckpointError(
                    f"{path}: damaged or truncated shard of {whole} bytes (expected a header of at most "
                    f"{MAX_HEADER_BYTES} bytes inside the file, found one of {length})"
                )
            text = _text(file.read(length), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror})") from None
    found: dict[str, TensorInfo] = {}
    end = 0
    for name, begin, until, shape, dtype in sorted(_entries(text, path, dtypes, known), key=lambda it: it[1:3]):
        info = TensorInfo(path.name, shape, dtype, 8 + length + begin)
        if begin != end or until - begin != info.nbytes:
            raise CheckpointError(
                f"{path}: tensor {name}: expected {info.nbytes} bytes from {end} on for {dtype} {list(shape)}, "
                f"found data_offsets [{begin}, {until}]"
            )
        found[name], end = info, until
    if 8 + length + end != whole:
        raise CheckpointError(
            f"{path}: damaged or truncated shard of {whole} bytes (expected {8 + length + end}, the end of its tensors)"
        )
    return found


def _text(data: bytes, path: Path) -> str:
    """Decode a header, if it would not take much memory when it is parsed."""
    if (count := data.count(b"{")) > MAX_TENSORS:
        raise CheckpointError(f"{path}: expected at most {MAX_TENSORS} tensors in a shard, found {count}")
    if len(data) > MAX_WIDE_BYTES and not (data.isascii() and b"\\u" not in data):
        raise CheckpointError(f"{path}: expected at most {MAX_WIDE_BYTES} bytes of a header that is not all ASCII")
    try:
        return data.decode("utf-8")
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception | str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated shard (header: {error!s:.200})")


def _entries(text: str, path: Path, dtypes: Mapping[str, torch.dtype], known: Container[str] | None) -> list[Entry]:
    """Check a header entry by entry, so that a bad one is refused before all others are in memory."""
    found: list[Entry] = []
    names = set[str]()
    walk = Walk(text)
    try:
        with no_collection():
            if not walk.begins("{"):
                raise ValueError("expected an object")
            for name in walk.keys(names):
                names.add(name)
                if name == METADATA:
                    _check_metadata(walk, path)
                    continue
                check_name(name, path)
                if known is not None and name not in known:
                    raise CheckpointError(f"{path}: tensor {name} is in the file but not in the index")
                found.append(_entry(path, name, walk.short_value(MAX_ENTRY), dtypes))
            walk.end()
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    return found


def _check_metadata(walk: Walk, path: Path) -> None:
    """Refuse metadata that is long or no object of texts. Nobody here reads it."""
    if walk.begins("n") and walk.short_value(MAX_ENTRY) is None:
        return
    size, keys = 0, set[str]()
    for key in walk.keys(keys) if walk.begins("{") else ("",):
        if not key or not walk.begins('"'):
            raise CheckpointError(f"{path}: {METADATA}: expected an object of texts, found another value")
        keys.add(key)
        size += len(key) + len(walk.value())
        if size > MAX_METADATA:
            raise CheckpointError(f"{path}: {METADATA}: expected at most {MAX_METADATA} characters, found more")


def _entry(path: Path, name: str, entry: Any, dtypes: Mapping[str, torch.dtype]) -> Entry:
    """Check one entry of the header; return name, first byte, end, shape and dtype."""
    place = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        raise CheckpointError(f"{place}: expected dtype, shape and data_offsets, found {_shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CheckpointError(f"{place} has unsupported dtype {_shown(dtype)}")
    # A size of 0 counts as 1, because the strides of an empty tensor are products of its other sizes.
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) > MAX_SIZE:
        raise CheckpointError(
            f"{place}: expected a shape of at most {MAX_DIMENSIONS} dimensions, whole numbers up to {MAX_SIZE} "
            f"together, found {_shown(shape)}"
        )
    if 0 in shape:
        raise CheckpointError(f"{place}: expected no empty tensor, found {_shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{place}: expected data_offsets with two whole numbers, found {_shown(offsets)}")
    return name, offsets[0], offsets[1], tuple(shape), dtypes[dtype]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)


def _shown(value: Any) -> str:
    """Return the beginning of a value that may be long."""
    return f"{value!r:.80}"

"""Hidden states between layers, in files: they may exceed memory, and a killed run continues from them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from planner.output.files import write_json
from vllm_moeq.format import CheckpointError, read_json

HIDDEN_FILES = 4
"""Number of mapped files of hidden states while a layer runs: inputs and outputs of the layer and of its experts."""

ORIGINAL_FILES = 5
"""Number of further files for the original model beside it: inputs and outputs of the layer, inputs of its experts, and
of either model the layer's output without experts."""


def file_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose storage is a file; the system pages it in and out.

    The file is created, or extended with zeros to the tensor's size.

    Raises:
        CheckpointError: the file cannot be written, or the disk is too small.
    """
    count = 1
    for size in shape:
        count *= size
    try:
        with path.open("ab") as file:
            if count:
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write ({os.strerror(error.errno or 0)})") from None
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).reshape(shape)


def hidden_folder(parent: Path) -> Path:
    """Return the folder of a run's hidden states."""
    return parent / "hidden"


def remove_hidden(parent: Path) -> None:
    """Delete a run's hidden states."""
    shutil.rmtree(hidden_folder(parent), ignore_errors=True)


class HiddenStates:
    """The inputs of decoder layers, one file per layer, in a folder.

    A JSON file beside a layer's file marks it as complete. Call :meth:`drop` for a layer only when the next layer's
    input is complete: then a killed run can continue.

    Args:
        folder: created if missing.
        shape: [sequences, length, hidden].
        dtype: dtype of the states.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, layer: int) -> bool:
        """Tell whether the input of a layer is complete."""
        return self._path(layer).with_suffix(".json").is_file()

    def load(self, layer: int) -> torch.Tensor:
        """Return the input of a layer, mapped from its file.

        Raises:
            CheckpointError: the file has another size, shape or dtype than expected.
        """
        path = self._path(layer)
        expected = torch.Size(self.shape).numel() * self.dtype.itemsize
        found = path.stat().st_size if path.is_file() else 0
        if read_json(path.with_suffix(".json")) != self._facts() or found != expected:
            raise CheckpointError(f"{path}: expected {expected:,} bytes of {self._facts()}, found {found:,}")
        return file_tensor(path, self.shape, self.dtype)

    def create(self, layer: int) -> torch.Tensor:
        """Return an empty tensor for the input of a layer, which is not yet complete."""
        path = self._path(layer)
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        return file_tensor(path, self.shape, self.dtype)

    def complete(self, layer: int) -> None:
        """Mark the input of a layer as complete, after it has reached the disk."""
        descriptor = os.open(self._path(layer), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        write_json(self._path(layer).with_suffix(".json"), self._facts())

    def drop(self, layer: int) -> None:
        """Delete the input of a layer."""
        self._path(layer).with_suffix(".json").unlink(missing_ok=True)
        self._path(layer).unlink(missing_ok=True)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a zeroed tensor in a file of this name, in place of an earlier one."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        return file_tensor(path, shape, dtype)

    def discard(self, name: str) -> None:
        """Delete the file of a scratch tensor; its disk is free when the tensor is."""
        (self.folder / name).unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.bin"

    def _facts(self) -> dict[str, object]:
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

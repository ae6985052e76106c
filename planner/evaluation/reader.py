"""Run a model over windows of a text: layer by layer if its architecture allows it, else whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from planner.common.progress import Progress
from planner.evaluation.reader_by_layer import LayerReader
from planner.evaluation.reader_whole import WholeReader
from planner.model.codecs import can_read, read_settings
from planner.model.quantized import is_moeq
from planner.model.recognize import find_architecture
from vllm_moeq.format import ConfigError, read_config_json


class Reader(Protocol):
    """A model that reads windows of one length.

    Attributes:
        folder: the model's folder.
        vocabulary: number of logits.
        state_bytes: bytes of one token's hidden states.
    """

    folder: Path
    vocabulary: int
    state_bytes: int

    def read(self, tokens: torch.Tensor, folder: Path, progress: Progress, what: str) -> torch.Tensor:
        """Return the head's input [windows, length, hidden], mapped from a file. Continue a killed run.

        Args:
            tokens: int64 [windows, length].
            folder: folder for files; the caller deletes it.
            progress: shows the progress.
            what: label of the progress.

        Raises:
            MoeqError: a damaged tensor, a full disk.
        """

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield a function from hidden states [n, hidden] to float32 logits [n, vocabulary]."""

    def release(self) -> None:
        """Free the memory of everything but the head."""

    def close(self) -> None:
        """Free all memory and close all files."""


def open_reader(folder: Path, device: torch.device, batch: int | None = None) -> Reader:
    """Return the reader for a model.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        device: device that the model runs on.
        batch: windows at a time; None for as many as give some thousand tokens.

    Raises:
        MoeqError: a damaged config or checkpoint, a model that transformers cannot load.
    """
    return (LayerReader if reads_by_layers(folder) else WholeReader)(folder, device, batch)


def reads_by_layers(folder: Path) -> bool:
    """Tell whether a model can run with one layer in memory at a time.

    Raises:
        ConfigError: no usable config.json.
    """
    config = read_config_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'}: expected an object, found {type(config).__name__}")
    row = find_architecture(config)
    readable = is_moeq(config) or can_read(read_settings(folder, config))
    return row is not None and row.uncalibrated is None and readable

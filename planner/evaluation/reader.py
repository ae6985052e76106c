"""How a model reads windows of a text: layer by layer where its architecture can, else whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from planner.common.progress import Progress
from planner.evaluation.reader_by_layer import LayerReader
from planner.evaluation.reader_whole import WholeReader
from planner.model.architectures import find_architecture
from planner.model.encodings import DECODED
from planner.model.quantized import is_moeq
from vllm_moeq.format import ConfigError, read_json


class Reader(Protocol):
    """A model that reads windows of one length.

    Attributes:
        folder: the model's.
        vocabulary: number of logits.
        state_bytes: what the states of one token take.
    """

    folder: Path
    vocabulary: int
    state_bytes: int

    def read(self, tokens: torch.Tensor, folder: Path, progress: Progress, what: str) -> torch.Tensor:
        """Return what the model's head turns into logits [windows, length, hidden], in a file; continues a killed run.

        Args:
            tokens: int64 [windows, length].
            folder: where files go; the caller deletes it.
            progress: says how far it is.
            what: is being read.

        Raises:
            MoeqError: a damaged tensor, a full disk.
        """

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield a function from states [n, hidden] to float32 logits [n, vocabulary]."""

    def release(self) -> None:
        """Give back the memory of all but the head."""

    def close(self) -> None:
        """Give back everything."""


def open_reader(folder: Path, device: torch.device, batch: int | None = None) -> Reader:
    """Return how a model reads.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        device: where the model computes.
        batch: windows at a time; None for some thousand tokens.

    Raises:
        MoeqError: a damaged config or checkpoint, a model that transformers cannot load.
    """
    return (LayerReader if reads_by_layers(folder) else WholeReader)(folder, device, batch)


def reads_by_layers(folder: Path) -> bool:
    """Tell whether a model can be read with one of its layers in memory.

    Raises:
        ConfigError: no usable config.json.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'}: expected an object, found {type(config).__name__}")
    row, method = find_architecture(config), config.get("quantization_config")
    readable = method is None or is_moeq(config) or (isinstance(method, dict) and method.get("quant_method") in DECODED)
    return row is not None and row.uncalibrated is None and readable

"""Run a model over a text with one decoder layer in memory, and one of its experts at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from planner.calibration.reading.decoder import ROWS, Decoder, compute_dtype
from planner.calibration.reading.exact import advance
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import first_hidden
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.quantized import DequantizedModel, is_moeq
from planner.model.source import SourceModel
from vllm_moeq.format import read_config_json


class LayerReader:
    """See :class:`planner.evaluation.reader.Reader`. A moeq checkpoint computes with its dequantized values.

    Raises:
        MoeqError: a damaged checkpoint, or one that transformers lays out in another way.
    """

    def __init__(self, folder: Path, device: torch.device, batch: int | None = None) -> None:
        self.folder = folder
        self._model: SourceModel
        self._odp: Mapping[str, float] = {}
        if is_moeq(read_config_json(folder / "config.json")):
            self._model = quantized = DequantizedModel(folder)
            self._odp = quantized.odp
        else:
            self._model = SourceModel(folder)
        self._batch = batch
        self._decoder = Decoder(self._model, read_layout(self._model), device, compute_dtype(device))
        self.vocabulary = self._decoder.vocabulary
        self.state_bytes = int(self._decoder.config.hidden_size) * self._decoder.dtype.itemsize

    def read(self, tokens: torch.Tensor, folder: Path, progress: Progress, what: str) -> torch.Tensor:
        """See :class:`planner.evaluation.reader.Reader`. Continue a killed run after its last finished layer."""
        self._decoder.rows = ROWS if self._batch is None else self._batch * tokens.shape[1]
        found = read_layers(self._decoder, first_hidden(self._decoder, tokens, folder), progress, what, self._odp)
        self._model.shards.check_unchanged()
        return found

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        """See :class:`planner.evaluation.reader.Reader`."""
        return self._decoder.head()

    def release(self) -> None:
        """Do nothing: between calls no layer is in memory."""

    def close(self) -> None:
        """See :class:`planner.evaluation.reader.Reader`."""
        self._model.shards.close()


def read_layers(
    decoder: Decoder,
    store: HiddenStates,
    progress: Progress,
    what: str,
    odp: Mapping[str, float],
    keep: Collection[int] = (),
) -> torch.Tensor:
    """Return the last layer's output [sequences, length, hidden], mapped from a file.

    Layers whose output is already in ``store`` are not run again.

    Args:
        decoder: the model.
        store: hidden states; it must have the input of at least one layer.
        progress: shows the progress.
        what: label of the progress.
        odp: experts prefix → threshold; an expert is skipped below this share of the token's largest routing weight.
        keep: indices of layers whose input is not deleted.
    """
    first = max(index for index in range(len(decoder) + 1) if store.has(index))
    for index in progress.track(range(first, len(decoder)), what):
        layer = decoder.moe.get(index)
        threshold = 0.0 if layer is None else odp.get(layer.prefix, 0.0)
        advance(decoder, index, store.load(index), store.create(index + 1), store, odp=threshold)
        store.complete(index + 1)
        if index not in keep:
            store.drop(index)
    return store.load(len(decoder))

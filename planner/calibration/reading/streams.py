"""The hidden states between layers behind quantized layers, and beside them those of the original model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import add_experts
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import OUTPUTS, Routed, finish, first_hidden, route


@dataclass(frozen=True)
class Streams:
    """The inputs of decoder layers for the same tokens in two models.

    Attributes:
        quantized: those behind quantized layers.
        original: those of the original model; None to calibrate symmetrically, without them.
    """

    quantized: HiddenStates
    original: HiddenStates | None

    @classmethod
    def open(cls, decoder: Decoder, tokens: torch.Tensor, parent: Path, asymmetric: bool) -> Streams:
        """Return a run's streams, and compute the first layer's input if no layer's input is there yet.

        Args:
            decoder: the model.
            tokens: int64 [sequences, length].
            parent: parent of the folder with the hidden states.
            asymmetric: whether to carry the original model's states.
        """
        states = first_hidden(decoder, tokens, parent)
        if not asymmetric:
            return cls(states, None)
        beside = HiddenStates(states.folder / "original", states.shape, states.dtype)
        if states.has(0) and not beside.has(0):
            beside.create(0)[:] = states.load(0)
            beside.complete(0)
        return cls(states, beside)

    def has(self, layer: int) -> bool:
        """Tell whether the input of a layer is complete in every stream."""
        return self.quantized.has(layer) and (self.original is None or self.original.has(layer))

    def load(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the input of a layer [sequences, length, hidden] behind quantized layers, and in the original model.

        Raises:
            CheckpointError: a file has another size, shape or dtype than expected.
        """
        return self.quantized.load(layer), None if self.original is None else self.original.load(layer)

    def drop(self, layer: int) -> None:
        """Delete the input of a layer."""
        self.quantized.drop(layer)
        if self.original is not None:
            self.original.drop(layer)


def advance_original(decoder: Decoder, index: int, store: HiddenStates, last: bool) -> Routed | None:
    """Run a layer of the original model, and write the next layer's input unless this is the last layer.

    Args:
        decoder: the model.
        index: the layer's index.
        store: the original model's states; the layer's input is complete.
        last: whether no layer follows.

    Returns:
        The pass through the layer's MoE block with the layer's output without experts, but without its experts'
        outputs, whose file is gone; None if the layer has no such block.
    """
    hidden, layer = store.load(index), decoder.moe.get(index)
    routed = None if layer is None else route(decoder, index, hidden, store, keep_base=True)
    if not last:
        if layer is not None and routed is not None:
            add_experts(decoder, layer, routed)
        finish(decoder, index, hidden, store.create(index + 1), None if routed is None else routed.outputs)
        store.complete(index + 1)
    store.discard(OUTPUTS)
    return None if routed is None else replace(routed, outputs=torch.empty(0))

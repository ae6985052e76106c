"""Routed experts without a quantizer's codes: as a module that gradients pass, and expert by expert on files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.rounded import load_rounded
from planner.calibration.reading.routed import Routed, finish, route
from planner.model.layout import MoeLayer
from vllm_moeq.format import drop_weak


class ExactExperts(torch.nn.Module):
    """Computes the experts of a layer; differentiable, so their weights stay in memory for the time of a batch.

    Attributes:
        inputs, ids, weights: what the last call was given: [tokens, hidden], [tokens, k] and [tokens, k].
        outputs: what it returned [tokens, hidden].
    """

    def __init__(self, decoder: Decoder, layer: MoeLayer) -> None:
        super().__init__()
        self.decoder, self.layer = decoder, layer
        self.inputs = self.ids = self.weights = self.outputs = torch.empty(0)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See :meth:`planner.calibration.reading.decoder.Decoder.layer`."""
        result = torch.zeros_like(hidden)
        for expert in range(self.layer.num_experts):
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            if tokens.numel():
                exact = load_expert(self.decoder.model, self.layer, expert, self.decoder.device, self.decoder.dtype)
                output = exact.inner(hidden[tokens], self.decoder.activation) @ exact.down.mT
                result = result.index_add(0, tokens, output * weights[tokens, slots][:, None].to(output))
        self.inputs, self.ids, self.weights, self.outputs = hidden.detach(), ids, weights.detach(), result
        return result


def add_experts(decoder: Decoder, layer: MoeLayer, routed: Routed, widths: Sequence[int] | None = None) -> None:
    """Add the outputs of all experts of a layer, one in memory at a time, to ``routed.outputs``.

    Args:
        decoder: the model.
        layer: which one.
        routed: what its experts see.
        widths: bits to which each is rounded; None leaves them as they are.
    """
    for expert in range(layer.num_experts):
        if not bool((routed.ids == expert).any()):
            continue
        found = load_rounded(decoder, layer, expert, widths[expert] if widths else None)
        for inputs, weights, tokens in routed.chunks(expert, decoder.device):
            output = found.inner(inputs, decoder.activation) @ found.down.mT
            routed.add(tokens, output.float() * weights[:, None])


def advance(
    decoder: Decoder,
    index: int,
    hidden: torch.Tensor,
    result: torch.Tensor,
    store: HiddenStates,
    widths: Mapping[int, Sequence[int]] | None = None,
    odp: float = 0.0,
) -> None:
    """Run a whole layer.

    Args:
        decoder: the model.
        index: of the layer.
        hidden: its input [sequences, length, hidden].
        result: its output, same shape; filled.
        store: where what lies between goes.
        widths: layer index → bits to which each expert is rounded; None leaves the model as it is.
        odp: experts whose routing weight is below this share of a token's largest are skipped, if not 0.
    """
    layer, outputs = decoder.moe.get(index), None
    if layer is not None:
        routed = route(decoder, index, hidden, store)
        if odp:
            ids, weights = drop_weak(routed.ids, routed.weights, odp)
            routed = replace(routed, ids=ids, weights=weights)
        add_experts(decoder, layer, routed, widths[index] if widths else None)
        outputs = routed.outputs
    finish(decoder, index, hidden, result, outputs)

"""Routed experts as a layer's forward pass runs them: with gradients, or one at a time at a given width."""

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
    """Computes the experts of a layer. It is differentiable, so their weights stay in memory during a batch.

    Attributes:
        inputs, ids, weights: arguments of the last call: [tokens, hidden], [tokens, k] and [tokens, k].
        outputs: result of the last call [tokens, hidden].
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
                output = exact(hidden[tokens], self.decoder.activation)
                result = result.index_add(0, tokens, output * weights[tokens, slots][:, None].to(output))
        self.inputs, self.ids, self.weights, self.outputs = hidden.detach(), ids, weights.detach(), result
        return result


def add_experts(decoder: Decoder, layer: MoeLayer, routed: Routed, widths: Sequence[int] | None = None) -> None:
    """Add the outputs of all experts of a layer to ``routed.outputs``, with one expert in memory at a time.

    Args:
        decoder: the model.
        layer: the MoE layer.
        routed: the tokens routed to its experts.
        widths: bits to round each expert to; None leaves the experts as they are.
    """
    for expert in range(layer.num_experts):
        if not bool((routed.ids == expert).any()):
            continue
        found = load_rounded(decoder, layer, expert, widths[expert] if widths else None)
        for inputs, weights, tokens in routed.chunks(expert, decoder.device):
            output = found(inputs, decoder.activation)
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
        index: the layer's index.
        hidden: the layer's input [sequences, length, hidden].
        result: the layer's output, same shape; filled in.
        store: folder for intermediate tensors.
        widths: layer index → bits to round each expert to; None leaves the model as it is.
        odp: if not 0, skip experts whose routing weight is below this share of the token's largest.
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

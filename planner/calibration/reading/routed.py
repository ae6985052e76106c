"""A layer's forward pass in two: the first finds each expert's tokens, the second uses the experts' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from planner.calibration.reading.decoder import ROWS, Decoder
from planner.calibration.reading.hidden import HiddenStates, hidden_folder

OUTPUTS = "outputs.bin"
"""The file of the experts' outputs."""


@dataclass
class Routed:
    """The MoE block's inputs for all calibration tokens, with room for the outputs of its experts.

    Attributes:
        inputs: [tokens, hidden], in a file.
        outputs: weighted sum over experts, float32 [tokens, hidden], in a file; filled by :meth:`add`.
        ids: expert of each slot, int64 [tokens, k]; −1 where the input is not finite.
        weights: routing weight of each slot, float32 [tokens, k].
        probabilities: softmax over all experts at each slot, float32 [tokens, k].
        originals: the inputs of the same block in the original model [tokens, hidden], in a file; None if the pass does
            not know them.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    probabilities: torch.Tensor
    originals: torch.Tensor | None = None

    @property
    def dropped(self) -> int:
        """Number of tokens whose hidden state is not finite: no expert learns from them."""
        return int((self.ids < 0).all(dim=1).sum())

    def slots(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens routed to an expert and the slots they use, int64 [n] each, tokens ascending."""
        tokens, slots = (self.ids == expert).nonzero(as_tuple=True)
        return tokens, slots

    def chunks(self, expert: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (inputs [n, hidden], weights [n], tokens [n]) of an expert, up to :data:`ROWS` tokens at a time."""
        tokens, slots = self.slots(expert)
        for part, places in zip(tokens.split(ROWS), slots.split(ROWS), strict=True):
            if part.numel():
                yield self.inputs[part].to(device), self.weights[part, places].to(device), part

    def original(self, tokens: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """Return the original model's inputs [n, hidden] for some tokens; None if the pass does not know them."""
        return None if self.originals is None else self.originals[tokens].to(device)

    def beside(self, originals: torch.Tensor) -> Routed:
        """Return the pass with the original model's inputs; a token is dropped where they are not finite."""
        usable = torch.cat([torch.isfinite(part).all(dim=1) for part in originals.split(ROWS)])
        return replace(self, ids=torch.where(usable[:, None], self.ids, -1), originals=originals)

    def add(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """Add an expert's weighted outputs [n, hidden] to the outputs of its tokens."""
        self.outputs.index_add_(0, tokens, values.to("cpu", torch.float32))


class _Recording(torch.nn.Module):
    """Stands in for the experts in the first pass: records their arguments and returns zeros."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs, self.next = inputs, 0
        self.logits = torch.empty(0)
        self.slots: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def note_logits(self, router: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        """Keep the router's logits [tokens, experts]; the router's hook calls this just before :meth:`forward`.

        They are computed anew: models differ in what a router returns, and some return no logits.
        """
        weight = router.get_parameter("weight")
        self.logits = torch.nn.functional.linear(inputs[0].flatten(0, -2).to(weight.dtype), weight)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See :meth:`planner.calibration.reading.decoder.Decoder.layer`."""
        place = slice(self.next, self.next + hidden.shape[0])
        self.next = place.stop
        self.inputs[place] = hidden.to(self.inputs.device)
        probabilities = self.logits.float().softmax(dim=-1).gather(1, ids.long())
        usable = torch.isfinite(hidden).all(dim=1)[:, None]
        kept = torch.where(usable, ids.long(), -1)
        self.slots.append((kept.cpu(), weights.float().cpu(), probabilities.cpu()))
        return torch.zeros_like(hidden)


class _Replaying(torch.nn.Module):
    """Stands in for the experts in the second pass: returns the outputs computed for these tokens."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs, self.next = outputs, 0

    def forward(self, hidden: torch.Tensor, _ids: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        """See :meth:`planner.calibration.reading.decoder.Decoder.layer`."""
        place = slice(self.next, self.next + hidden.shape[0])
        self.next = place.stop
        return self.outputs[place].to(hidden)


def route(
    decoder: Decoder,
    index: int,
    hidden: torch.Tensor,
    store: HiddenStates,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> Routed:
    """Run a layer up to its experts, on all sequences.

    Args:
        decoder: the model.
        index: index of an MoE layer.
        hidden: the layer's input [sequences, length, hidden].
        store: folder for the tensors.
        replaced: see :meth:`Decoder.layer`.
    """
    tokens, layer = hidden.shape[0] * hidden.shape[1], decoder.moe[index]
    size = layer.shapes[layer.projections.gate][1]
    inputs = store.scratch("inputs.bin", (tokens, size), hidden.dtype)
    recording = _Recording(inputs)
    hook = decoder.router(index).register_forward_hook(recording.note_logits)
    try:
        with decoder.layer(index, recording, replaced) as call:
            for _, part in batches(hidden, decoder.rows):
                call(part)
    finally:
        hook.remove()
    ids, weights, probabilities = (torch.cat(parts) for parts in zip(*recording.slots, strict=True))
    outputs = store.scratch(OUTPUTS, (tokens, size), torch.float32)
    return Routed(inputs, outputs, ids, weights, probabilities)


def finish(
    decoder: Decoder,
    index: int,
    hidden: torch.Tensor,
    result: torch.Tensor,
    outputs: torch.Tensor | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Run a whole layer with its experts' outputs already computed, and write the next layer's input.

    Args:
        decoder: the model.
        index: the layer's index.
        hidden: the layer's input [sequences, length, hidden].
        result: the layer's output, same shape; filled in.
        outputs: outputs of the routed experts [tokens, hidden]; None if the layer has none.
        replaced: see :meth:`Decoder.layer`.
    """
    experts = None if outputs is None else _Replaying(outputs)
    with decoder.layer(index, experts, replaced) as call:
        for begin, part in batches(hidden, decoder.rows):
            result[begin : begin + part.shape[0]] = call(part).to(result.device)


def batches(hidden: torch.Tensor, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index of the first sequence, sequences) in batches of up to ``rows`` tokens or of one sequence."""
    size = max(1, rows // hidden.shape[1])
    for begin in range(0, hidden.shape[0], size):
        yield begin, hidden[begin : begin + size]


def first_hidden(decoder: Decoder, tokens: torch.Tensor, parent: Path) -> HiddenStates:
    """Return the hidden states of a run, and compute the first layer's input if no layer's input is there yet.

    Args:
        decoder: the model; it keeps the other arguments of its layers (:meth:`Decoder.embed`).
        tokens: int64 [sequences, length].
        parent: parent of the folder with the hidden states.
    """
    shape = (*tokens.shape, decoder.config.hidden_size)
    store = HiddenStates(hidden_folder(parent), (shape[0], shape[1], shape[2]), decoder.dtype)
    if any(store.has(index) for index in range(len(decoder) + 1)):
        sizes = {part.shape[0]: part for _, part in batches(tokens, decoder.rows)}
        for part in sizes.values():
            decoder.embed(part)
        return store
    hidden = store.create(0)
    for begin, part in batches(tokens, decoder.rows):
        hidden[begin : begin + part.shape[0]] = decoder.embed(part).to(hidden.device)
    store.complete(0)
    return store

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

BASE = "base.bin"
"""The file of the layer's output without its experts."""

ROUNDING = 0.05
"""Largest relative difference between equal outputs, in bfloat16 with room to spare."""


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
        base: the layer's output without its experts [tokens, hidden], in a file; None if the pass did not keep it.
        original_base: the same of the original model; None if the pass does not know it.
        factor: what the layer multiplies its experts' outputs by before it adds them to the rest of its output.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    probabilities: torch.Tensor
    originals: torch.Tensor | None = None
    base: torch.Tensor | None = None
    original_base: torch.Tensor | None = None
    factor: float = 1.0

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

    def lost(self, tokens: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """Return what quantization took from the layer's output before its experts, float32 [n, hidden].

        It is divided by the sum of a token's routing weights, and by the layer's factor: all of it is made up for if
        each of the token's experts adds this to its output. None if the pass does not know it.
        """
        if self.base is None or self.original_base is None:
            return None
        due = self.original_base[tokens].to(device).float() - self.base[tokens].to(device).float()
        total = self.factor * self.weights[tokens].sum(dim=1, keepdim=True).to(device)
        return torch.where((total > 0) & torch.isfinite(due).all(dim=1, keepdim=True), due / total, 0)

    def beside(self, original: Routed, factor: float | None = None) -> Routed:
        """Return the pass with what it has in the original model; a token is dropped where that is not finite.

        Args:
            original: the same layer's pass in the original model.
            factor: see :func:`outputs_factor`; None leaves out what was lost before the experts.
        """
        finite = torch.cat([torch.isfinite(part).all(dim=1) for part in original.inputs.split(ROWS)])
        ids = torch.where(finite[:, None], self.ids, -1)
        both = replace(self, ids=ids, originals=original.inputs)
        return both if factor is None else replace(both, original_base=original.base, factor=factor)

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
    keep_base: bool = False,
) -> Routed:
    """Run a layer up to its experts, on all sequences.

    Args:
        decoder: the model.
        index: index of an MoE layer.
        hidden: the layer's input [sequences, length, hidden].
        store: folder for the tensors.
        replaced: see :meth:`Decoder.layer`.
        keep_base: whether to keep the layer's output without its experts.
    """
    tokens, layer = hidden.shape[0] * hidden.shape[1], decoder.moe[index]
    size = layer.shapes[layer.projections.gate][1]
    inputs = store.scratch("inputs.bin", (tokens, size), hidden.dtype)
    base = store.scratch(BASE, tuple(hidden.shape), hidden.dtype) if keep_base else None
    recording = _Recording(inputs)
    hook = decoder.router(index).register_forward_hook(recording.note_logits)
    try:
        with decoder.layer(index, recording, replaced) as call:
            for begin, part in batches(hidden, decoder.rows):
                output = call(part)
                if base is not None:
                    base[begin : begin + part.shape[0]] = output.to(base.device)
    finally:
        hook.remove()
    ids, weights, probabilities = (torch.cat(parts) for parts in zip(*recording.slots, strict=True))
    outputs = store.scratch(OUTPUTS, (tokens, size), torch.float32)
    flat = None if base is None else base.flatten(0, 1)
    return Routed(inputs, outputs, ids, weights, probabilities, base=flat)


def outputs_factor(
    decoder: Decoder,
    index: int,
    hidden: torch.Tensor,
    routed: Routed,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> float | None:
    """Return the number by which a layer multiplies its experts' outputs before it adds them to the rest of its output.

    Args:
        decoder: the model.
        index: index of an MoE layer.
        hidden: the layer's input [sequences, length, hidden]; the first sequence is tried.
        routed: the layer's pass on it, with its base.
        replaced: see :meth:`Decoder.layer`.

    Returns:
        The number, above 0; None if the layer does anything else with them, such as a norm.
    """
    assert routed.base is not None
    base = routed.base[: hidden.shape[1]].float()
    usable = torch.isfinite(base).all(dim=1)
    if routed.outputs.shape[1] != base.shape[1] or not bool(usable.any()):
        return None
    outputs = torch.randn(base.shape, generator=torch.Generator().manual_seed(0)) * base[usable].square().mean().sqrt()
    with decoder.layer(index, _Replaying(outputs), replaced) as call:
        added = call(hidden[:1]).flatten(0, 1).cpu().float() - base
    added, outputs = added[usable], outputs[usable]
    factor = float((added * outputs).sum() / outputs.square().sum())
    off = float((added - factor * outputs).norm() / outputs.norm())
    return factor if factor > 0 and off < ROUNDING * factor else None


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

"""Gradients of a loss with respect to every layer's experts, last layer first, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import ExactExperts
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import Routed, batches

Labels = Literal["sampled", "text"]
"""Next tokens in the loss: drawn from the model's own distribution, or taken from the text."""

LOGITS = 1 << 26
"""Number of logits in memory at a time."""


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of the loss, −Σ log p(next token) in nats, at one MoE layer.

    Attributes:
        index: the layer's index.
        routed: the experts' inputs and routing; ``outputs`` are ∂loss / ∂(sum of the routed experts), float32 [tokens,
            hidden].
    """

    index: int
    routed: Routed


class Watch(Protocol):
    """Gets the gradients of linears while a layer's are computed."""

    def modules(self, index: int) -> Mapping[str, torch.nn.Module]:
        """Return the linears of a layer to watch, by any names; the layer is loaded."""

    def add(self, index: int, found: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take name → (inputs [sequences, length, K], gradients of the outputs [sequences, length, N]) of a batch."""


def backward(
    decoder: Decoder,
    store: HiddenStates,
    tokens: torch.Tensor,
    labels: Labels,
    seed: int,
    watch: Watch | None = None,
) -> Iterator[LayerGradient]:
    """Yield the gradient of each MoE layer, last layer first.

    Args:
        decoder: the model.
        store: the input of every layer and the last layer's output, for at least these sequences.
        tokens: int64 [sequences, length]; the first sequences of the store.
        labels: next tokens in the loss.
        seed: seed of drawn labels.
        watch: gets the gradients of linears too.
    """
    shape = (*tokens.shape, decoder.config.hidden_size)
    above = store.scratch("gradient-0.bin", shape, torch.float32)
    below = store.scratch("gradient-1.bin", shape, torch.float32)
    _head(decoder, store.load(len(decoder))[: len(tokens)], tokens, labels, seed, above)
    for index in reversed(range(len(decoder))):
        layer = decoder.moe.get(index)
        experts = None if layer is None else ExactExperts(decoder, layer)
        routed = _Parts(store, tokens.numel(), shape[2], decoder.dtype)
        with (
            decoder.layer(index, experts, differentiable=True) as call,
            _noting(watch.modules(index) if watch else {}) as noted,
        ):
            for begin, part in batches(store.load(index)[: len(tokens)], decoder.rows):
                rows = slice(begin, begin + len(part))
                inputs = part.to(decoder.device, decoder.dtype).requires_grad_()
                output = call(inputs)
                wanted = [inputs, *([] if experts is None else [experts.outputs])]
                watched = [seen[1] for seen in noted.values()]
                gradients = torch.autograd.grad(output, [*wanted, *watched], above[rows].to(output))
                below[rows] = gradients[0].to(below)
                if experts is not None:
                    routed.append(experts, gradients[1])
                if watch is not None:
                    pairs = zip(noted.items(), gradients[len(wanted) :], strict=True)
                    watch.add(index, {name: (seen[0], gradient) for (name, seen), gradient in pairs})
                noted.clear()
        if layer is not None:
            yield LayerGradient(index, routed.joined())
        above, below = below, above


@contextmanager
def _noting(
    modules: Mapping[str, torch.nn.Module],
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield a dictionary that gets name → (input, output) of each module's last call."""
    noted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            noted[name] = arguments[0].detach(), output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


class _Parts:
    """Collects a :class:`Routed` batch by batch."""

    def __init__(self, store: HiddenStates, tokens: int, size: int, dtype: torch.dtype) -> None:
        self.inputs = store.scratch("gradient-inputs.bin", (tokens, size), dtype)
        self.gradients = store.scratch("gradient-experts.bin", (tokens, size), torch.float32)
        self.slots: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.next = 0

    def append(self, experts: ExactExperts, gradient: torch.Tensor) -> None:
        """Add the arguments of the experts' last call, and the gradient [tokens, hidden] of its result."""
        place = slice(self.next, self.next + len(gradient))
        self.next = place.stop
        self.inputs[place] = experts.inputs.to(self.inputs)
        self.gradients[place] = gradient.to(self.gradients)
        usable = torch.isfinite(experts.inputs).all(dim=1)[:, None]
        self.slots.append((torch.where(usable, experts.ids.long(), -1).cpu(), experts.weights.float().cpu()))

    def joined(self) -> Routed:
        """Return all batches together."""
        ids, weights = (torch.cat(parts) for parts in zip(*self.slots, strict=True))
        return Routed(self.inputs, self.gradients, ids, weights, torch.empty(0))


def _head(
    decoder: Decoder, hidden: torch.Tensor, tokens: torch.Tensor, labels: Labels, seed: int, result: torch.Tensor
) -> None:
    """Write the gradient with respect to the last layer's output to ``result`` [sequences, length, hidden]."""
    flat, filled = hidden.flatten(0, 1), result.flatten(0, 1)
    following = torch.cat((tokens[:, 1:], torch.full((len(tokens), 1), -1)), dim=1).flatten()
    uniform = torch.rand(len(flat), generator=torch.Generator().manual_seed(seed))
    with decoder.head() as logits:
        for rows in torch.arange(len(flat)).split(head_rows(decoder.vocabulary)):
            part = flat[rows].to(decoder.device, decoder.dtype).requires_grad_()
            with torch.enable_grad():
                likely = logits(part).log_softmax(dim=-1)
                drawn = _draw(likely, uniform[rows]) if labels == "sampled" else following[rows].to(likely.device)
                chosen = likely.gather(1, drawn.clamp_min(0)[:, None])[:, 0]
                loss = -chosen[drawn >= 0].sum()
            filled[rows] = torch.autograd.grad(loss, part)[0].to(filled)


def head_rows(vocabulary: int) -> int:
    """Return the number of tokens whose logits are in memory at a time."""
    return max(1, LOGITS // vocabulary)


def _draw(likely: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token [n] per row of log-probabilities [n, vocabulary], by numbers in [0, 1) [n]."""
    below = likely.detach().exp().cumsum(dim=-1)
    place = torch.searchsorted(below, uniform.to(below)[:, None] * below[:, -1:])
    return place[:, 0].clamp_max(likely.shape[1] - 1)

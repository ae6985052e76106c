"""The exact KL divergence of a model with one expert rounded: one forward pass per expert and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from planner.calibration.kl.gradients import head_rows
from planner.calibration.kl.rounding import changes
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import add_experts, advance
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import finish, route
from planner.common.progress import Progress

AT_A_TIME = 1 << 30
"""Maximum bytes of hidden states of the variants that pass through the model together."""

Variant = tuple[int, int]
"""(expert, bits)."""


@dataclass(frozen=True)
class Background:
    """A model whose experts are rounded already.

    Attributes:
        widths: layer index → bits per expert.
        states: the input of every layer, for the measured sequences.
    """

    widths: Mapping[int, Sequence[int]]
    states: HiddenStates


def measure_divergence(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    wanted: Mapping[int, Sequence[Variant]],
    progress: Progress,
    around: Background | None = None,
) -> dict[int, dict[Variant, float]]:
    """Return layer index → (expert, bits) → Σ over tokens of KL(original ‖ rounded), in nats.

    Args:
        decoder: the model.
        store: the input of every layer and the last layer's output, for at least these sequences.
        sequences: number of the store's sequences to read.
        wanted: layer index → variants, rounded one at a time.
        progress: shows the progress.
        around: model in which one expert is changed at a time; by default the original.
    """
    found: dict[int, dict[Variant, float]] = {}
    if not wanted:
        return found
    most = at_a_time(store, sequences)
    parts = [
        (index, variants[begin : begin + most])
        for index, variants in wanted.items()
        for begin in range(0, len(variants), most)
    ]
    for index, variants in progress.track(parts, "measuring KL"):
        values = _run(decoder, store, sequences, index, variants, around)
        found.setdefault(index, {}).update(zip(variants, values, strict=True))
    return found


def _run(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    index: int,
    variants: Sequence[Variant],
    around: Background | None,
) -> list[float]:
    """Return the divergences of one layer's variants, which pass through the later layers as one batch."""
    start = (around.states if around else store).load(index)[:sequences]
    present = around.widths[index] if around else None
    length, size = start.shape[1:]
    routed = route(decoder, index, start, store)
    layer = decoder.moe[index]
    add_experts(decoder, layer, routed, present)
    tokens = sequences * length
    outputs = store.scratch("variant-outputs.bin", (len(variants), tokens, size), torch.float32)
    outputs[:] = routed.outputs
    for expert in {expert for expert, _ in variants}:
        widths = [bits for other, bits in variants if other == expert]
        before = present[expert] if present else None
        for bits, places, change in changes(decoder, layer, expert, routed, widths, before):
            outputs[variants.index((expert, bits))].index_add_(0, places, change.cpu())
    shape = (len(variants) * sequences, length, size)
    hidden, result = (store.scratch(f"variants-{number}.bin", shape, store.dtype) for number in range(2))
    hidden.view(len(variants), *start.shape)[:] = start
    finish(decoder, index, hidden, result, outputs.flatten(0, 1))
    return divergences_behind(decoder, store, sequences, index, (hidden, result), around)


def at_a_time(store: HiddenStates, sequences: int) -> int:
    """Return the number of variants that pass through the model together."""
    _, length, size = store.shape
    return max(1, AT_A_TIME // (sequences * length * size * store.dtype.itemsize))


def divergences_behind(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    index: int,
    states: tuple[torch.Tensor, torch.Tensor],
    around: Background | None = None,
) -> list[float]:
    """Return each variant's Σ KL, when the variants differ in one layer and pass through the later ones as one batch.

    Args:
        decoder: the model.
        store: see :func:`measure_divergence`.
        sequences: number of the store's sequences.
        index: index of the layer in which they differ.
        states: a tensor to write to, and the outputs of that layer, [variants × sequences, length, hidden].
        around: see :func:`measure_divergence`.
    """
    hidden, result = states
    for later in range(index + 1, len(decoder)):
        hidden, result = result, hidden
        advance(decoder, later, hidden, result, store, around.widths if around else None)
    exact = store.load(len(decoder))[:sequences].flatten(0, 1)
    return _divergences(decoder, exact, result.view(-1, *exact.shape))


def _divergences(decoder: Decoder, exact: torch.Tensor, others: torch.Tensor) -> list[float]:
    """Return each variant's Σ KL from last hidden states [tokens, hidden] and [variants, tokens, hidden]."""
    totals = [0.0] * len(others)
    with torch.no_grad(), decoder.head() as logits:
        for rows in torch.arange(len(exact)).split(head_rows(decoder.vocabulary)):
            reference = logits(exact[rows]).log_softmax(dim=-1)
            weights = reference.exp()
            for number, other in enumerate(others):
                difference = reference - logits(other[rows]).log_softmax(dim=-1)
                totals[number] += float((weights * difference).sum(dtype=torch.float64))
    return totals

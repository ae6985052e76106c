"""The exact KL divergence of a model with one group of linears rounded: one forward pass per group and width."""

from __future__ import annotations

from collections.abc import Sequence

from planner.calibration.kl.linears.rounding import rounded_group
from planner.calibration.kl.measured import at_a_time, divergences_behind
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import add_experts
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import finish, route
from planner.common.progress import Progress
from planner.model.linear_groups import LinearGroup
from vllm_moeq.format import Linear

MEASURING = "measuring linears"
"""Name of this work in the progress."""

Variant = tuple[LinearGroup, Linear]
"""A group, and the format to which it is rounded."""

Costs = dict[LinearGroup, dict[int, float]]
"""Group → width → Σ KL over tokens, nats."""


def measure_linears(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    groups: Sequence[LinearGroup],
    formats: Sequence[Linear],
    progress: Progress,
) -> Costs:
    """Return Σ over tokens of KL(original ‖ rounded), in nats, for each group in each format.

    Args:
        decoder: the model.
        store: the input of every layer and the last layer's output, for at least these sequences.
        sequences: number of the store's sequences to read.
        groups: the groups, rounded one at a time.
        formats: one format per width.
        progress: shows the progress.
    """
    most = at_a_time(store, sequences)
    parts: list[tuple[int, list[Variant]]] = []
    for index in sorted({group.index for group in groups}):
        variants = [(group, spec) for group in groups if group.index == index for spec in formats]
        parts += [(index, variants[begin : begin + most]) for begin in range(0, len(variants), most)]
    found: Costs = {group: {} for group in groups}
    for index, variants in progress.track(parts, MEASURING):
        values = _run(decoder, store, sequences, index, variants)
        for (group, spec), value in zip(variants, values, strict=True):
            found[group][spec.bits] = max(0.0, value)  # sums of floats may end a little below zero
    return found


def _run(decoder: Decoder, store: HiddenStates, sequences: int, index: int, variants: Sequence[Variant]) -> list[float]:
    """Return the divergences of one layer's variants."""
    start, layer = store.load(index)[:sequences], decoder.moe.get(index)
    shape = (len(variants) * sequences, *start.shape[1:])
    spare, result = (store.scratch(f"variants-{number}.bin", shape, store.dtype) for number in range(2))
    for (group, spec), output in zip(variants, result.split(sequences), strict=True):
        replaced, outputs = rounded_group(decoder.model, group, spec), None
        if layer is not None:
            routed = route(decoder, index, start, store, replaced)
            add_experts(decoder, layer, routed)
            outputs = routed.outputs
        finish(decoder, index, start, output, outputs, replaced)
    return divergences_behind(decoder, store, sequences, index, (spare, result))

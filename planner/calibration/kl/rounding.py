"""The change in a layer's output when one expert is rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.rounded import load_rounded
from planner.calibration.reading.routed import Routed
from planner.model.layout import MoeLayer


def changes(
    decoder: Decoder,
    layer: MoeLayer,
    expert: int,
    routed: Routed,
    widths: Sequence[int],
    before: int | None = None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (bits, tokens int64 [n], change float32 [n, hidden]) of an expert's weighted output, in parts.

    Args:
        decoder: the model.
        layer: the MoE layer.
        expert: the expert's index.
        routed: the tokens routed to the experts.
        widths: bit widths to round to.
        before: width that the expert has already; None if it is not rounded.
    """
    if not bool((routed.ids == expert).any()):
        return
    present = load_rounded(decoder, layer, expert, before)
    others = {bits: load_rounded(decoder, layer, expert, bits) for bits in widths}
    for inputs, weights, tokens in routed.chunks(expert, decoder.device):
        output = present(inputs, decoder.activation)
        for bits, other in others.items():
            changed = other(inputs, decoder.activation)
            yield bits, tokens, (changed.float() - output.float()) * weights[:, None]

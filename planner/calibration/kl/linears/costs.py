"""The KL divergence that each width of each group of linears adds: measured if that is cheap, else estimated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planner.calibration.kl.divergence import Effort
from planner.calibration.kl.linears.estimated import estimate_linears
from planner.calibration.kl.linears.gains import linear_gains
from planner.calibration.kl.linears.measured import measure_linears
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.common.progress import Progress
from planner.model.linear_groups import LinearGroup, linear_groups
from planner.quantization.settings import default_linear

WIDTHS = (4, 8)
"""The widths that cost something; 16 bits are the source's own values."""


def linear_costs(
    decoder: Decoder,
    store: HiddenStates,
    tokens: torch.Tensor,
    effort: Effort,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], int]:
    """Return the cost of each group of linears in nats per token, and the number of measurements.

    All groups are measured if the effort allows it, else none: one backward pass over all tokens estimates them.

    Args:
        decoder: the model.
        store: the input of every layer and the last layer's output.
        tokens: int64 [sequences, length].
        effort: limit on the measurements.
        seed: seed of the labels drawn for the gradient.
        progress: shows the progress.

    Returns:
        ``<bits>`` for rounding to nearest and ``gptq_<bits>`` → nats per token, float64 [groups], in the order of
        :func:`planner.model.linear_groups.linear_groups`; and the number of measurements.
    """
    groups = linear_groups(decoder.layout)
    formats = [default_linear(decoder.model, decoder.layout, bits) for bits in WIDTHS]
    if not groups:
        return {name: torch.zeros(0) for bits in WIDTHS for name in (f"{bits}", f"gptq_{bits}")}, 0
    measured = effort.passes >= effort.tokens * runs(groups, len(decoder)) > 0
    if measured:
        found, counted = measure_linears(decoder, store, effort.sequences, groups, formats, progress), effort.tokens
    else:
        found = estimate_linears(decoder, store, tokens, groups, formats, seed, progress)
        counted = tokens.numel()
    gains = linear_gains(decoder, store, len(tokens), groups, formats, progress)
    costs: dict[str, torch.Tensor] = {}
    for bits in WIDTHS:
        plain = torch.tensor([found[group][bits] / counted for group in groups], dtype=torch.float64)
        costs[f"{bits}"] = plain
        costs[f"gptq_{bits}"] = plain * torch.tensor([gains[group.kind][bits] for group in groups])
    return costs, len(groups) * len(WIDTHS) if measured else 0


def runs(groups: Sequence[LinearGroup], layers: int) -> int:
    """Return the number of runs of a layer that measure all groups: the layers before a group do not change."""
    return len(WIDTHS) * sum(layers - group.index for group in groups)

"""The cost of rounding linears, from gradients: the second-order term of the KL divergence, for all by one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from planner.calibration.kl.gradients import backward
from planner.calibration.kl.linears.measured import Costs
from planner.calibration.kl.linears.rounding import rounded_group
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.common.progress import Progress
from planner.model.linear_groups import LinearGroup
from vllm_moeq.format import Linear

ESTIMATING = "gradients of linears"
"""Name of this work in the progress."""


def estimate_linears(
    decoder: Decoder,
    store: HiddenStates,
    tokens: torch.Tensor,
    groups: Sequence[LinearGroup],
    formats: Sequence[Linear],
    seed: int,
    progress: Progress,
) -> Costs:
    """Return an estimate of Σ KL(original ‖ rounded) over tokens, for each group in each format.

    Args:
        decoder: the model.
        store: see :func:`planner.calibration.kl.gradients.backward`.
        tokens: int64 [sequences, length].
        groups: the groups.
        formats: one format per width.
        seed: seed of the labels drawn for the gradient.
        progress: shows the progress.
    """
    sums = _Sums(decoder, groups, formats)
    steps = backward(decoder, store, tokens, "sampled", seed, sums)
    for _ in progress.track(steps, ESTIMATING, len(decoder.moe)):
        pass
    return sums.found


class _Sums:
    """Adds ½ (Σ g·Δ)², g the gradient of a group's outputs and Δ their change, the inner sum over a sequence.

    With labels drawn from the model its mean is the KL divergence to second order. The sum has to be inside the
    square: what one linear changes at a token that others attend to adds up.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[LinearGroup], formats: Sequence[Linear]) -> None:
        self.decoder, self.groups, self.formats = decoder, groups, formats
        self.found: Costs = {group: {spec.bits: 0.0 for spec in formats} for group in groups}
        self.changes: dict[tuple[LinearGroup, int], dict[str, torch.Tensor]] = {}

    def modules(self, index: int) -> Mapping[str, torch.nn.Module]:
        """See :class:`planner.calibration.kl.gradients.Watch`."""
        model, decoder = self.decoder.model, self.decoder
        self.changes = {
            (group, spec.bits): {
                name: (value - model.shards.load(name).float()).to(decoder.device, decoder.dtype)
                for name, value in rounded_group(model, group, spec).items()
            }
            for group in self.groups
            if group.index == index
            for spec in self.formats
        }
        names = {name for changed in self.changes.values() for name in changed}
        return {
            name: module
            for path, module in decoder.layers[index].named_modules()
            if (name := decoder.row.checkpoint_name(index, f"{path}.weight")) in names
        }

    def add(self, index: int, found: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:  # noqa: ARG002
        """See :class:`planner.calibration.kl.gradients.Watch`."""
        for (group, bits), changed in self.changes.items():
            total = sum(
                (gradient.float() * (inputs @ changed[name].mT).float()).flatten(1).sum(dim=1)
                for name, (inputs, gradient) in found.items()
                if name in changed
            )
            self.found[group][bits] += float((torch.as_tensor(total).double().square() / 2).sum())

"""The cost of an expert's width when other experts are rounded too, measured once around one plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch

from planner.allocation import solve_budget
from planner.calibration.kl.measured import Background, Variant, measure_divergence
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import advance
from planner.calibration.reading.hidden import HiddenStates
from planner.common.progress import Progress

Table = dict[int, torch.Tensor]
"""Width → Σ KL over tokens, nats, float64 [experts]."""

OPERATING_POINT = Fraction(3, 8)
"""The plan's average width, as a share of the way from the lowest width to the highest.

Lower budgets matter more; at higher ones experts interact less.
"""

DOUBT = 0.1
"""Share of the layer's mean that is added to two measurements before their ratio is taken."""

LARGEST = 4.0
"""Upper limit of that ratio."""


def with_interactions(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    costs: Mapping[int, Table],
    alone: Mapping[int, Mapping[Variant, float]],
    progress: Progress,
) -> dict[int, Table]:
    """Return costs half-way between an expert's cost alone and its cost among other rounded experts.

    The costs give a plan at the operating point. In this plan the width of one expert is changed at a time. The change
    of the model's divergence is compared with the change that the same step makes in the original model.

    Args:
        decoder: the model.
        store: the input of every layer and the last layer's output.
        sequences: number of the store's sequences to read.
        costs: layer index → width → Σ KL of each expert.
        alone: layer index → (expert, bits) → Σ KL over these sequences when only that expert of the original is
            rounded.
        progress: shows the progress.
    """
    plan = _plan(costs)
    around = _background(decoder, store, sequences, plan)
    wanted: dict[int, list[Variant]] = {
        index: [(expert, bits) for expert, bits in variants if bits != plan[index][expert]]
        for index, variants in alone.items()
    }
    last = max(costs)
    wanted.setdefault(last, []).append((0, plan[last][0]))  # no change: measures the plan itself
    found = measure_divergence(decoder, store, sequences, wanted, progress, around)
    present = found[last].pop((0, plan[last][0]))
    for index, widths in plan.items():
        found.setdefault(index, {}).update(dict.fromkeys(enumerate(widths), present))
    return {index: _between(table, alone.get(index, {}), found[index]) for index, table in costs.items()}


def _plan(costs: Mapping[int, Table]) -> dict[int, list[int]]:
    """Return layer index → the cheapest widths at the operating point."""
    choices = sorted(next(iter(costs.values())))
    members = [(index, expert) for index, table in costs.items() for expert in range(len(table[choices[0]]))]
    table = [[float(costs[index][bits][expert]) for bits in choices] for index, expert in members]
    average = choices[0] + OPERATING_POINT * (choices[-1] - choices[0])
    chosen = solve_budget(table, choices, math.floor(average * len(members)))
    plan: dict[int, list[int]] = {}
    for (index, _), bits in zip(members, chosen, strict=True):
        plan.setdefault(index, []).append(bits)
    return plan


def _background(decoder: Decoder, store: HiddenStates, sequences: int, plan: Mapping[int, list[int]]) -> Background:
    """Run the plan's model over the sequences and keep the input of every layer."""
    states = HiddenStates(store.folder / "plan", (sequences, *store.shape[1:]), store.dtype)
    states.create(0)[:] = store.load(0)[:sequences]
    states.complete(0)
    for index in range(len(decoder)):
        advance(decoder, index, states.load(index), states.create(index + 1), states, plan)
        states.complete(index + 1)
    return Background(plan, states)


def _between(costs: Table, alone: Mapping[Variant, float], among: Mapping[Variant, float]) -> Table:
    """Scale each step from the highest width by the mean of 1 and the ratio of its effects among others and alone."""
    high = max(costs)
    result: Table = {high: costs[high]}
    for bits in sorted(costs)[:-1]:
        known = [
            expert
            for expert in range(len(costs[bits]))
            if all((expert, width) in alone and (expert, width) in among for width in (bits, high))
        ]
        before = {expert: alone[expert, bits] - alone[expert, high] for expert in known}
        after = {expert: among[expert, bits] - among[expert, high] for expert in known}
        doubt = DOUBT * math.fsum(abs(step) for step in before.values()) / max(1, len(known))
        factors = torch.ones_like(costs[bits])
        for expert in known:
            ratio = (after[expert] + doubt) / (before[expert] + doubt) if before[expert] + doubt > 0 else 1.0
            factors[expert] = (1 + min(max(ratio, 0.0), LARGEST)) / 2
        result[bits] = costs[high] + (costs[bits] - costs[high]) * factors
    return result

"""What an expert's width costs among other experts that are rounded too: measured once around one plan."""

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
"""Of the way from the lowest width to the highest: budgets below matter more, those above interact less."""

DOUBT = 0.1
"""Share of the layer's mean that is added to what was measured before two measurements are compared."""

LARGEST = 4.0
"""Of the ratio between them."""


def with_interactions(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    costs: Mapping[int, Table],
    alone: Mapping[int, Mapping[Variant, float]],
    progress: Progress,
) -> dict[int, Table]:
    """Return costs that lie half-way between those of an expert alone and those among others.

    The plan that the costs lead to at the operating point is made; every expert's width is then changed in it, one at a
    time, and the change of the model's divergence compared with what the same step did in the original.

    Args:
        decoder: the model.
        store: the input of every layer and the last one's output.
        sequences: how many of the store's are read.
        costs: layer index → width → Σ KL of each expert.
        alone: layer index → (expert, bits) → Σ KL over these sequences of the original with that expert rounded.
        progress: says how far it is.
    """
    plan = _plan(costs)
    around = _background(decoder, store, sequences, plan)
    wanted: dict[int, list[Variant]] = {
        index: [(expert, bits) for expert, bits in variants if bits != plan[index][expert]]
        for index, variants in alone.items()
    }
    last = max(costs)
    wanted.setdefault(last, []).append((0, plan[last][0]))  # nothing changes: the plan itself
    found = measure_divergence(decoder, store, sequences, wanted, progress, around)
    present = found[last].pop((0, plan[last][0]))
    for index, widths in plan.items():
        found.setdefault(index, {}).update(dict.fromkeys(enumerate(widths), present))
    return {index: _between(table, alone.get(index, {}), found[index]) for index, table in costs.items()}


def _plan(costs: Mapping[int, Table]) -> dict[int, list[int]]:
    """Return the cheapest widths at the operating point, by layer index."""
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
    """Have the plan's model read the sequences."""
    states = HiddenStates(store.folder / "plan", (sequences, *store.shape[1:]), store.dtype)
    states.create(0)[:] = store.load(0)[:sequences]
    states.complete(0)
    for index in range(len(decoder)):
        advance(decoder, index, states.load(index), states.create(index + 1), states, plan)
        states.complete(index + 1)
    return Background(plan, states)


def _between(costs: Table, alone: Mapping[Variant, float], among: Mapping[Variant, float]) -> Table:
    """Scale each step from the highest width by the mean of 1 and what the step did among others over alone."""
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

"""One budget of bytes for experts and for the linears outside them: the cheapest choice of all widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from planner.allocation import Item, solve_items
from planner.calibration.kl.linears.costs import WIDTHS as COSTLY
from planner.common.units import GIB
from planner.model.layout import Layout
from planner.model.linear_groups import LinearGroup, linear_groups
from planner.model.sizes import SHAPE_BYTES, Storage, expert_bytes, stored_bytes
from planner.model.source import SourceModel
from planner.planning.assign import ExpertId, Widths
from planner.planning.method import Costs
from planner.planning.priced import Priced
from planner.planning.request import LinearChoice
from vllm_moeq.format import Linear, UsageError

WIDTHS = (*COSTLY, 16)
"""The widths of linears. The first one is what a plan without this choice would give them."""

ALL = "linears"
"""The name under which :data:`planner.planning.method.Costs` get the scores of all groups of linears."""


def solve_together(
    model: SourceModel,
    layout: Layout,
    way: Priced,
    linears: Sequence[Sequence[float]],
) -> tuple[Widths, dict[str, int]]:
    """Return the cheapest widths of experts and linears within the bytes; overridden experts keep theirs.

    Args:
        model: the source.
        layout: its layers.
        way: how experts are stored, with options that have a :class:`planner.planning.request.LinearChoice`.
        linears: costs [groups][widths], see :func:`linear_table`.

    Returns:
        The widths of experts, and name without ``.weight`` → width of every linear.

    Raises:
        UsageError: the overrides leave too little for the others.
    """
    options = way.options
    choice, choices = options.linears, options.bit_choices
    if choice is None:
        raise ValueError("expected options that choose widths of linears")
    members: list[tuple[ExpertId, tuple[int, ...]]] = []
    items: list[Item] = []
    for layer in layout.layers:
        for expert, (row, schemes) in enumerate(zip(way.tables[layer.prefix], way.schemes[layer.prefix], strict=True)):
            fixed = options.overrides.get(f"{layer.prefix}.{expert}")
            free = choices if fixed is None else (fixed,)
            members.append(((layer.prefix, expert), free))
            places = [choices.index(bits) for bits in free]
            sizes = (expert_bytes(layer, choices[at], options.group_size, schemes[at]) for at in places)
            items.append(Item(tuple(sizes), tuple(float(row[at]) for at in places)))
    groups = linear_groups(layout)
    sized = [_sizes(model, group, choice) for group in groups]
    items += [Item(sizes, tuple(map(float, row))) for sizes, row in zip(sized, linears, strict=True)]
    chosen = solve_items(items, _limit(model, layout, way, sum(sizes[0] for sizes in sized)))
    if chosen is None:
        raise UsageError("--overrides: the widths given leave too few bytes for the others; lower an override")
    widths = {member: free[place] for (member, free), place in zip(members, chosen, strict=False)}
    rest = zip(groups, chosen[len(members) :], strict=True)
    return widths, {base: WIDTHS[place] for group, place in rest for base in group.bases}


def linear_table(costs: Costs, scores: Mapping[str, Sequence[float]]) -> list[list[float]]:
    """Return costs [groups][widths] by the function of costs that experts have; 16 bits cost nothing."""
    return [[*row, 0.0] for row in costs({ALL: scores}, COSTLY)[ALL]]


def objective(layout: Layout, linears: Sequence[Sequence[float]], widths: Mapping[str, int]) -> float:
    """Return the sum of the costs of some widths of linears."""
    pairs = zip(linear_groups(layout), linears, strict=True)
    return math.fsum(row[WIDTHS.index(widths[group.bases[0]])] for group, row in pairs)


def _sizes(model: SourceModel, group: LinearGroup, choice: LinearChoice) -> tuple[int, ...]:
    """Return the bytes of a group's linears for each width.

    A linear of 16 bits counts as if it stored its shape too: then all sizes have a large common divisor.
    """
    infos = [model.shards.info(name) for name in group.names]
    formats = [Linear.model_validate({"bits": bits, "group_size": choice.linear_group_size}) for bits in WIDTHS]
    return tuple(
        sum(stored_bytes(info, spec) + (SHAPE_BYTES if spec.bits == WIDTHS[-1] else 0) for info in infos)
        for spec in formats
    )


def _limit(model: SourceModel, layout: Layout, way: Priced, least: int) -> int:
    """Return the bytes for experts and linears: the whole budget, or what the average gives without this choice.

    Without it, experts get a whole number of bits, the average times their number.

    Args:
        model: the source.
        layout: its layers.
        way: how experts are stored.
        least: bytes of all linears at the first width.
    """
    options = way.options
    if options.budget_gib is not None:
        kept = sum(model.shards.info(name).nbytes for name in layout.kept)
        signs = sum(Storage(rotated=way.rotated).shared_bytes(layer) for layer in layout.layers)
        return math.floor(Fraction(str(options.budget_gib)) * GIB) - kept - signs
    low = options.bit_choices[0]
    smallest = sum(
        expert_bytes(layer, low, options.group_size, schemes[0])
        for layer in layout.layers
        for schemes in way.schemes[layer.prefix]
    )
    weights = sum(layer.num_experts * layer.weights_per_expert for layer in layout.layers)
    average = Fraction(math.floor(options.avg_bits * layout.num_experts), layout.num_experts)
    return least + smallest + math.floor((average - low) * weights / 8)

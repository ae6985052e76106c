"""The costs of each width of each expert, for each way of storing experts that a plan may choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from planner.allocation.equal_bytes import cheaper
from planner.model.layout import Layout
from planner.model.sizes import expert_bytes
from planner.planning.method import ROTATED, CostTable, Method, Scores
from planner.planning.request import PlanOptions
from planner.quantization.quantizers.table import POSSIBLE, quantizer_name, scheme_for
from vllm_moeq.format import GRID, SCHEMES, TRELLIS_SCHEME, Scheme

T = TypeVar("T")


@dataclass(frozen=True)
class Priced:
    """One way of storing experts.

    Attributes:
        options: the options, with the average that this way allows.
        tables: experts prefix → costs [experts][widths]; empty for a method without costs.
        schemes: experts prefix → the scheme of each width of each expert [experts][widths].
        rotated: whether all experts are rotated, as they are beside trellises.
    """

    options: PlanOptions
    tables: Mapping[str, CostTable] = field(default_factory=dict)
    schemes: Mapping[str, Sequence[Sequence[Scheme]]] = field(default_factory=dict)
    rotated: bool = False

    def names(self, experts: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
        """Return experts prefix → the name of each expert's scheme; empty where all are grids that are not rotated.

        Args:
            experts: experts prefix → bits per expert.
        """
        choices = self.options.bit_choices
        if not self.rotated:
            return {}
        return {
            prefix: [row[choices.index(bits)].name for row, bits in zip(self.schemes[prefix], widths, strict=True)]
            for prefix, widths in experts.items()
        }


def priced(layout: Layout, method: Method, scores: Scores, options: PlanOptions) -> list[Priced]:
    """Return the ways of storing experts that a plan may choose, the one with grids alone first.

    Args:
        layout: the model's layers.
        method: the method.
        scores: its scores.
        options: the options of the plan.
    """
    first, *others = POSSIBLE[options.scheme]
    if not others or method.costs is None:  # an estimate ranks nothing, and grids are larger
        return [_of_scheme(layout, method, scores, options, SCHEMES[first])]
    average = options.avg_bits if options.trellis_bits is None else options.trellis_bits
    grids = _of_scheme(layout, method, scores, options, GRID)
    trellises = _of_scheme(layout, method, scores, replace(options, avg_bits=average), TRELLIS_SCHEME)
    # An average that fills a budget with trellises leaves no bytes for the scales of grids.
    return [grids, trellises if options.filled_by_average else _mixed(layout, method, scores, trellises)]


def _of_scheme(layout: Layout, method: Method, scores: Scores, options: PlanOptions, scheme: Scheme) -> Priced:
    """Return the way in which all experts whose width a scheme has are stored by it."""
    each = [scheme_for(bits, scheme.name) for bits in options.bit_choices]
    costs = method.costs_for(quantizer_name(scheme, options.quantizer))
    schemes = {layer.prefix: [each] * layer.num_experts for layer in layout.layers}
    return Priced(options, costs(scores, options.bit_choices) if costs else {}, schemes, scheme is not GRID)


def _mixed(layout: Layout, method: Method, scores: Scores, way: Priced) -> Priced:
    """Return a way with a rotated grid wherever that costs less than the way's own schemes at equal bytes."""
    options, costs = way.options, method.costs_for(ROTATED)
    if costs is None:
        raise ValueError(f"expected a method with costs of rotated grids, got {options.resolved_method}")
    grids = costs(scores, options.bit_choices)
    tables: dict[str, list[list[float]]] = {}
    schemes: dict[str, list[list[Scheme]]] = {}
    for layer in layout.layers:
        own, size = way.schemes[layer.prefix][0], options.group_size
        sizes, others = (
            [expert_bytes(layer, bits, size, it) for bits, it in zip(options.bit_choices, row, strict=True)]
            for row in (own, [GRID] * len(own))
        )
        for before, grid in zip(way.tables[layer.prefix], grids[layer.prefix], strict=True):
            better = cheaper(sizes, before, others, grid)
            tables.setdefault(layer.prefix, []).append(_where(better, grid, before))
            schemes.setdefault(layer.prefix, []).append(_where(better, [GRID] * len(own), own))
    return Priced(options, tables, schemes, way.rotated)


def _where(chosen: Sequence[bool], first: Sequence[T], second: Sequence[T]) -> list[T]:
    return [a if choice else b for choice, a, b in zip(chosen, first, second, strict=True)]

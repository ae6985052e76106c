"""An allocation method: the scores that it needs, and the order or the costs that it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vllm_moeq.format import GRID

LayerScores = Mapping[str, Sequence[float]]
"""Metric → one value per expert."""

Scores = Mapping[str, LayerScores]
"""Experts prefix → metric → one value per expert."""

CostTable = Sequence[Sequence[float]]
"""[experts][widths]."""

ROTATED = "rotated"
"""The name under which :attr:`Method.quantizer_costs` has the costs of GPTQ's grids beside trellises."""

Scope = Literal["layer", "global"]
"""The experts that compete for bits: those of one layer, or those of all layers."""


@dataclass(frozen=True)
class OrderOptions:
    """Options that an order may depend on besides the scores."""

    zeta: float
    promotion: str
    seed: int


Order = Callable[[LayerScores, int, OrderOptions], list[int]]
Costs = Callable[[Scores, Sequence[int]], dict[str, CostTable]]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        metrics: scores computed from the weights, rows of :data:`planner.planning.scores.METRICS`.
        observed: counts of a calibration run, fields of ``LayerStatistics``.
        measures: other results of a calibration run, rows of ``planner.calibration.measures.MEASURES``.
        order: function that orders experts, highest precision first; widths are assigned down the order, by counts.
        costs: function that returns the cost of each width of each expert; the plan is the cheapest choice within the
            budget.
        quantizer_costs: name of a quantizer, or :data:`ROTATED` → the same for codes that it finds, where it makes a
            difference.
        gains: measure that the costs of other schemes than the grid need besides, a row of
            ``planner.calibration.measures.MEASURES``; None if they need none.
        kept_widths: with costs, keep at least one expert at each of this many highest widths.
        scope: experts that compete, unless ``--ranking`` says otherwise.
        layerwise: all experts of a layer get one width; a layer's score is its first expert's, its costs are sums.
        promotes: MaxVar may move experts up.
        random: the method depends on the seed.
        one_width: all experts get the average as their width, so the average must be a width of the format.
        choices: widths to choose from, unless ``--bits`` says otherwise.
        linears: measure of the costs of linears outside the experts, a row of
            ``planner.calibration.measures.MEASURES``, whose values have the names of the experts' costs; None if the
            method chooses no widths for them.
        only_compared: reason why no checkpoint can hold its widths; None if one can.
    """

    metrics: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    order: Order | None = None
    costs: Costs | None = None
    quantizer_costs: Mapping[str, Costs] = field(default_factory=dict)
    gains: str | None = None
    kept_widths: int = 0
    scope: Scope = "layer"
    layerwise: bool = False
    promotes: bool = False
    random: bool = False
    one_width: bool = False
    choices: tuple[int, ...] = (1, 2, 3)
    linears: str | None = None
    only_compared: str | None = None

    def costs_for(self, quantizer: str) -> Costs | None:
        """Return the costs for the codes that a quantizer finds."""
        return self.quantizer_costs.get(quantizer, self.costs)

    def other_measures(self, scheme: str) -> tuple[str, ...]:
        """Return the measures that a scheme needs besides; ``auto`` needs those of all."""
        return (self.gains,) if self.gains is not None and scheme != GRID.name else ()

    @property
    def calibrated(self) -> bool:
        """Whether the method needs the statistics of a text."""
        return bool(self.observed or self.measures)


def ascending(metric: str) -> Order:
    """Return an order by rising values of a metric; equal values keep the experts' order."""
    return lambda scores, experts, _: sorted(range(experts), key=lambda expert: scores[metric][expert])


def descending(metric: str) -> Order:
    """Return an order by falling values of a metric; equal values keep the experts' order."""
    return lambda scores, experts, _: sorted(range(experts), key=lambda expert: -scores[metric][expert])


def measured(name: str) -> Costs:
    """Return a function that reads the costs measured by calibration, ``<name>_<bits>``, from the scores."""

    def costs(scores: Scores, widths: Sequence[int]) -> dict[str, CostTable]:
        return {
            prefix: list(zip(*(found[f"{name}_{bits}"] for bits in widths), strict=True))
            for prefix, found in scores.items()
        }

    return costs


def gained(name: str, gain: str) -> Costs:
    """Return a function that scales the costs ``<name>_<bits>`` by what a quantizer gains, ``gain_<gain>_<bits>``."""

    def costs(scores: Scores, widths: Sequence[int]) -> dict[str, CostTable]:
        plain, factors = measured(name)(scores, widths), measured(f"gain_{gain}")(scores, widths)
        return {
            prefix: [
                [cost * factor for cost, factor in zip(*rows, strict=True)]
                for rows in zip(table, factors[prefix], strict=True)
            ]
            for prefix, table in plain.items()
        }

    return costs

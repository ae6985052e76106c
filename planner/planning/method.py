"""What an allocation method is: the scores that it asks for, and the order or the costs that it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LayerScores = Mapping[str, Sequence[float]]
"""Metric → one value per expert."""

Scores = Mapping[str, LayerScores]
"""Experts prefix → metric → one value per expert."""

CostTable = Sequence[Sequence[float]]
"""[experts][widths]."""

Scope = Literal["layer", "global"]
"""Who competes for bits: the experts of a layer, or those of all layers."""


@dataclass(frozen=True)
class OrderOptions:
    """What an order may depend on besides the scores."""

    zeta: float
    promotion: str
    seed: int


Order = Callable[[LayerScores, int, OrderOptions], list[int]]
Costs = Callable[[Scores, Sequence[int]], dict[str, CostTable]]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        metrics: computed from the weights, rows of :data:`planner.sensitivity.METRICS`.
        observed: counts of a calibration run, fields of ``LayerStatistics``.
        measures: what a calibration run has to find out besides, rows of ``planner.calibration.measures.MEASURES``.
        order: of experts, highest precision first; widths are given down it by counts.
        costs: of each width of each expert; the cheapest choice within the budget is solved for.
        calibrated_costs: the same where a quantizer with calibration will find the codes, if that makes a difference.
        kept_widths: with costs: at least one expert at each of so many highest widths.
        scope: who competes, unless ``--ranking`` says otherwise.
        layerwise: all experts of a layer get one width; scores of a layer are those of its first expert, costs sums.
        promotes: MaxVar may move experts up.
        random: depends on the seed.
        one_width: all experts have the average as their width, so it has to be a width of the format.
        choices: widths to choose from, unless ``--bits`` says otherwise.
        only_compared: why no checkpoint can hold its widths, if so.
    """

    metrics: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    order: Order | None = None
    costs: Costs | None = None
    calibrated_costs: Costs | None = None
    kept_widths: int = 0
    scope: Scope = "layer"
    layerwise: bool = False
    promotes: bool = False
    random: bool = False
    one_width: bool = False
    choices: tuple[int, ...] = (1, 2, 3)
    only_compared: str | None = None

    def costs_for(self, calibrated: bool) -> Costs | None:
        """Return the costs where the quantizer reads a text, or where it does not."""
        return self.calibrated_costs if calibrated and self.calibrated_costs is not None else self.costs

    @property
    def calibrated(self) -> bool:
        """Whether it needs the statistics of a text."""
        return bool(self.observed or self.measures)


def ascending(metric: str) -> Order:
    """Return the order by rising values of a metric; equal values keep the experts' order."""
    return lambda scores, experts, _: sorted(range(experts), key=lambda expert: scores[metric][expert])


def descending(metric: str) -> Order:
    """Return the order by falling values of a metric; equal values keep the experts' order."""
    return lambda scores, experts, _: sorted(range(experts), key=lambda expert: -scores[metric][expert])


def measured(name: str) -> Costs:
    """Return the costs that calibration measured itself, under ``<name>_<bits>``."""

    def costs(scores: Scores, widths: Sequence[int]) -> dict[str, CostTable]:
        return {
            prefix: list(zip(*(found[f"{name}_{bits}"] for bits in widths), strict=True))
            for prefix, found in scores.items()
        }

    return costs

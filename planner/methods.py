"""Allocation methods: which scores each needs and how it orders experts. A new one is a row."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from planner.allocation import rank_experts

LayerScores = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class OrderOptions:
    """What an order may depend on besides the scores."""

    zeta: float
    promotion: str
    seed: int


@dataclass(frozen=True)
class Method:
    """One row: the metrics to compute and the order they give (highest precision first).

    ``order`` is None where there is nothing to rank. A method with ``costs`` does not give widths down an order: it
    returns what each width costs each expert, [experts][widths], and the cheapest choice within the budget is solved
    for, with at least one expert at each of the ``kept_widths`` highest widths.
    """

    metrics: tuple[str, ...]
    order: Callable[[LayerScores, int, OrderOptions], list[int]] | None
    promotes: bool = False
    random: bool = False
    costs: Callable[[LayerScores, Sequence[int]], list[list[float]]] | None = None
    kept_widths: int = 0


def _by_norm_and_variance(scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return rank_experts(scores["router_norm"], scores["max_var"], options.zeta, options.promotion)


def _by_norm(scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return sorted(range(experts), key=lambda expert: scores["router_norm"][expert])


def _by_variance(scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return sorted(range(experts), key=lambda expert: -scores["max_var"][expert])


def _by_tokens(scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return sorted(range(experts), key=lambda expert: -scores["tokens"][expert])


def _by_gate_probability(scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return sorted(range(experts), key=lambda expert: -scores["gate_probability"][expert])


FREQUENCY_POWER, WEIGHT_POWER = 1.0, 1.5
"""α and β of PMQ, as in its published code."""


def _pmq(scores: LayerScores, widths: Sequence[int]) -> list[list[float]]:
    """Return φ^α · w^β · ε(b) of PMQ (MC-MoE, Huang et al., 2025), φ and w normalised within the layer."""
    tokens, weights = scores["tokens"], scores["gate_probability"]
    all_tokens, all_weights = sum(tokens) or 1.0, sum(weights) or 1.0
    return [
        [
            (tokens[expert] / all_tokens) ** FREQUENCY_POWER
            * (weights[expert] / all_weights) ** WEIGHT_POWER
            * scores[f"error_{bits}"][expert]
            for bits in widths
        ]
        for expert in range(len(tokens))
    ]


def _shuffled(scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return random.Random(options.seed).sample(range(experts), experts)


METHODS: dict[str, Method] = {
    "router-norm-maxvar": Method(("router_norm", "max_var"), _by_norm_and_variance, promotes=True),
    "router-norm": Method(("router_norm",), _by_norm),
    "max-var": Method(("max_var",), _by_variance),
    "frequency": Method(("tokens",), _by_tokens),
    "weight": Method(("gate_probability",), _by_gate_probability),
    "pmq": Method(("tokens", "gate_probability"), None, costs=_pmq, kept_widths=2),
    "random": Method((), _shuffled, random=True),
    "uniform": Method((), None),
}

UNRANKED = Method((), None)
"""Gives widths by index: the same counts as any ranking, without reading a weight."""

DEFAULT_METHOD = "router-norm-maxvar"

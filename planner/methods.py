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

    ``order`` is None where there is nothing to rank.
    """

    metrics: tuple[str, ...]
    order: Callable[[LayerScores, int, OrderOptions], list[int]] | None
    promotes: bool = False
    random: bool = False


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


def _shuffled(scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return random.Random(options.seed).sample(range(experts), experts)


METHODS: dict[str, Method] = {
    "router-norm-maxvar": Method(("router_norm", "max_var"), _by_norm_and_variance, promotes=True),
    "router-norm": Method(("router_norm",), _by_norm),
    "max-var": Method(("max_var",), _by_variance),
    "frequency": Method(("tokens",), _by_tokens),
    "weight": Method(("gate_probability",), _by_gate_probability),
    "random": Method((), _shuffled, random=True),
    "uniform": Method((), None),
}

UNRANKED = Method((), None)
"""Gives widths by index: the same counts as any ranking, without reading a weight."""

DEFAULT_METHOD = "router-norm-maxvar"

"""This module checks Lemma 4.3 on one trained model: it computes the numbers and names the violated statements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.replication.theory.model import RELEVANT, Model, counted, draw, gates

SEQUENCES = 2000
"""Drawn for each token to estimate its probability to be chosen."""


class LemmaError(Exception):
    """A statement of Lemma 4.3 does not hold in a run."""


@dataclass
class Run:
    """One trained model. Lists have an entry per expert; "own" is the token with which its router was aligned.

    Attributes:
        seed: the seed of everything random.
        alpha: fraction of less prevalent tokens.
        steps: T.
        names: token of each expert, such as "-o1".
        own_before: p of the own token before training (Definition 4.2).
        own: p after training.
        opposite: probability that the negative of the own token is chosen at all, after training.
        gate: least gating value of the own token after training, over the sequences drawn.
        norm_change: Λ (Definition 3.1).
        activation: σ by the own token (eq. 6).
        projection: projection of the router on the own class's o.
        variance: MaxVar (Definition 3.2).
    """

    seed: int
    alpha: float
    steps: int
    names: list[str]
    own_before: list[float]
    own: list[float]
    opposite: list[float]
    gate: list[float]
    norm_change: list[float]
    activation: list[float]
    projection: list[float]
    variance: list[float]

    @property
    def bound(self) -> float:
        """Return (1 − 2α)/(2α), the lemma's bound of the ratio of activations."""
        return (1 - 2 * self.alpha) / (2 * self.alpha)

    def pairs(self) -> list[tuple[int, int]]:
        """Return (s, s') of one class, s aligned with the less prevalent token and s' with the more prevalent one."""
        rare = [s for s, name in enumerate(self.names) if name in ("o1", "o2")]
        return [(s, other) for s in rare for other, name in enumerate(self.names) if name == f"-{self.names[s]}"]

    def ratio(self, vector: str | None = None) -> float:
        """Return the least σ by −o of a prevalent over σ by o of a rare expert; ``vector`` o1 or o2: of one class."""
        pairs = [pair for pair in self.pairs() if vector in (None, self.names[pair[0]])]
        return min(self.activation[other] / self.activation[s] for s, other in pairs)

    def as_dict(self) -> dict[str, Any]:
        """Return everything that JSON can hold."""
        return asdict(self) | {"bound": self.bound, "ratio": self.ratio()}


def token_gates(model: Model, token: int, generator: torch.Generator) -> Tensor:
    """Return every expert's gating value of a relevant token in sequences with it, [k, SEQUENCES]; 0: not chosen."""
    tokens, _ = draw(model.setting, 0.0, SEQUENCES, generator)
    tokens[:, 0] = token
    counts, found = counted(model.setting, tokens), torch.zeros(len(model.router), SEQUENCES)
    for expert, scores in enumerate(model.scores()):
        best, gate = gates(scores, counts, model.setting.chosen)
        found[expert] = gate[best == token].sum(dim=0)
    return found


def all_gates(model: Model, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return each expert's gating values of its own token and of that token's negative, both [k, SEQUENCES]."""
    d = model.setting.dim
    table = {token: token_gates(model, token, generator) for token in (0, 1, d, d + 1)}
    own = [table[token][s] for s, token in enumerate(model.aligned.tolist())]
    opposite = [table[(token + d) % (2 * d)][s] for s, token in enumerate(model.aligned.tolist())]
    return torch.stack(own), torch.stack(opposite)


def proficiency(gate: Tensor, chosen: int) -> list[float]:
    """Return how often a gating value [k, B] is at least 1/l, up to rounding."""
    return (gate >= (1 - 1e-5) / chosen).float().mean(dim=1).tolist()


def max_variance(model: Model) -> Tensor:
    """Return MaxVar of every expert [k], of its neurons in the coordinates of the tokens' components."""
    return torch.stack([(neurons @ model.vectors).var(dim=1, correction=0).max() for neurons in model.neurons])


def names(model: Model) -> list[str]:
    """Return the token of each expert as text."""
    return [f"{'' if token < RELEVANT else '-'}o{token % model.setting.dim + 1}" for token in model.aligned.tolist()]


def violations(run: Run) -> list[str]:
    """Return what of Lemma 4.3 does not hold: eq. 8 of every expert, eq. 9 and the ratio of eq. 10 of every pair."""
    found = []
    for s, name in enumerate(run.names):
        if run.own[s] < 1:
            found.append(f"(i) expert {s} of {name}: p of {name} is {run.own[s]:.4f}, not 1")
        if run.opposite[s] > 0:
            found.append(
                f"(i) expert {s} of {name}: it chooses the negative with probability {run.opposite[s]:.4f}, not 0"
            )
    for s, other in run.pairs():
        pair = f"expert {other} of {run.names[other]} and expert {s} of {run.names[s]}"
        low, high = run.norm_change[s], run.norm_change[other]
        if not high > low:
            found.append(f"(ii) {pair}: router norm changes {high:.3f} and {low:.3f}, the former not larger")
        ratio = run.activation[other] / run.activation[s]
        if not ratio >= run.bound:
            found.append(f"(iii) {pair}: ratio of activations {ratio:.3f}, below {run.bound:.3f}")
    return [f"seed {run.seed}, α {run.alpha:g}: Lemma 4.3 {text}" for text in found]


def check(runs: Iterable[Run]) -> None:
    """Check Lemma 4.3 in every run.

    Raises:
        LemmaError: with a line for each violation, naming seed, α and statement.
    """
    found = [text for run in runs for text in violations(run)]
    if found:
        raise LemmaError("\n".join(found))

"""This module holds the two-layer MoE of the paper's theory (Section 4.2, Appendix H), its data, and its SGD.

All tokens are orthonormal vectors, or the negatives of two of them, and gradients are sums of tokens. Routers and
neurons are therefore kept as their projections on these vectors. This is a rotation, and SGD commutes with it. The
score of a token is then one number of the router, and the model needs only the counts of a sequence's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RELEVANT = 2
"""Vectors 0 and 1 are o_1 and o_2 of classes +1 and −1; tokens d and d + 1 are −o_1 and −o_2."""

CANDIDATES = 64
"""Best tokens of an expert among which its choice is sought first; 99 of 198 irrelevant tokens put about 32 there."""


@dataclass(frozen=True)
class Setting:
    """Sizes and rates, by default those of Appendix A; ``router_rate``, ``batch`` and ``duration`` are not given there.

    Attributes:
        dim: d, components of a token and number of vectors.
        experts: k; the first half adds to the output, the second half subtracts.
        neurons: m, per expert.
        tokens: n, per sequence.
        chosen: l, tokens that an expert chooses.
        deviation: standard deviation of all initial weights.
        expert_rate: η_e.
        router_rate: η_r.
        batch: B, sequences per step.
        duration: factor of l²·√(log l)/α in the number of steps (Lemma 4.3).
        rank: place of an expert's token among all tokens by its initial router, from 1.
    """

    dim: int = 200
    experts: int = 20
    neurons: int = 800
    tokens: int = 100
    chosen: int = 5
    deviation: float = 0.01
    expert_rate: float = 0.2
    router_rate: float = 0.0005
    batch: int = 1000
    duration: float = 1.0
    rank: int = 3

    def steps(self, alpha: float) -> int:
        """Return T for a fraction α of less prevalent tokens."""
        return math.ceil(self.duration * self.chosen**2 * math.sqrt(math.log(self.chosen)) / alpha)


@dataclass
class Model:
    """Weights as projections on the vectors.

    Attributes:
        setting: sizes.
        vectors: [d, d], a vector per row.
        signs: a of Section 4.2, [k].
        aligned: token with which the pretrained router of an expert is aligned, [k].
        router: [k, d].
        neurons: first layer, [k, m, d].
    """

    setting: Setting
    vectors: Tensor
    signs: Tensor
    aligned: Tensor
    router: Tensor
    neurons: Tensor

    @property
    def rare(self) -> Tensor:
        """Return which experts are aligned with o_1 or o_2, bool [k]."""
        return self.aligned < RELEVANT

    def scores(self) -> Tensor:
        """Return ⟨w_s, token⟩ of every token, [k, d + 2]."""
        return torch.cat([self.router, -self.router[:, :RELEVANT]], dim=1)

    def activations(self) -> Tensor:
        """Return σ of eq. 6 of every expert by every token, [k, d + 2]."""
        return torch.stack([activation(neurons) for neurons in self.neurons])


def activation(neurons: Tensor) -> Tensor:
    """Return the sum over neurons [m, d] of their ReLU for every token, [d + 2]."""
    negative = neurons[:, :RELEVANT].neg().relu()
    return torch.cat([neurons.relu().sum(dim=0), negative.sum(dim=0)])


def pretrained(setting: Setting, generator: torch.Generator) -> Model:
    """Return Gaussian weights whose routers are aligned as Section 4.2 assumes: with ±o_1 where a = 1, else with ±o_2.

    Rare and prevalent alternate, so γ = ½. A router's projection on its token changes places with its ``rank``-th
    largest one on an irrelevant vector: the weights remain a sample of the same Gaussian.
    """
    d, k = setting.dim, setting.experts
    gaussian = torch.randn(d, d, generator=generator)
    neurons = setting.deviation * torch.randn(k, setting.neurons, d, generator=generator)
    router = setting.deviation * torch.randn(k, d, generator=generator)
    expert = torch.arange(k)
    subtracts = (expert >= k // 2).long()
    prevalent = (expert % 2).long()
    for row, vector, sign in zip(router, subtracts.tolist(), (1 - 2 * prevalent).tolist(), strict=True):
        other = RELEVANT + int(row[RELEVANT:].argsort(descending=True)[setting.rank - 1])
        row[vector], row[other] = sign * row[other], row[vector].clone()
    aligned = subtracts + d * prevalent
    return Model(setting, torch.linalg.qr(gaussian).Q.T.contiguous(), 1.0 - 2 * subtracts, aligned, router, neurons)


def draw(setting: Setting, alpha: float, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequences as in Section 4.2: tokens [count, n], the relevant one first, and labels [count]."""
    tokens = torch.randint(RELEVANT, setting.dim, (count, setting.tokens), generator=generator)
    vector = torch.randint(0, RELEVANT, (count,), generator=generator)
    prevalent = torch.rand(count, generator=generator) >= alpha
    tokens[:, 0] = vector + setting.dim * prevalent
    return tokens, 1.0 - 2 * vector


def counted(setting: Setting, tokens: Tensor) -> Tensor:
    """Return how often each token occurs in each of the sequences [B, n], float [d + 2, B]."""
    count = len(tokens)
    places = tokens * count + torch.arange(count)[:, None]
    flat = torch.bincount(places.flatten(), minlength=(setting.dim + RELEVANT) * count)
    return flat.reshape(-1, count).float()


def gates(scores: Tensor, counts: Tensor, chosen: int, candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """Return what an expert chooses: the l best tokens of each sequence, and the softmax over them (eq. 15).

    Args:
        scores: the score of every token, [d + 2].
        counts: the number of times that every token is in every sequence, [d + 2, B].
        chosen: l.
        candidates: number of best tokens to look at; all if they do not suffice for a sequence.

    Returns:
        The candidates, [c], and the sum of the gating values of their copies in each sequence, [c, B].
    """
    best = scores.topk(min(candidates, len(scores))).indices
    upto = counts[best].cumsum(dim=0).clamp_max(chosen)
    if len(best) < len(scores) and float(upto[-1].min()) < chosen:
        return gates(scores, counts, chosen, len(scores))
    copies = upto.diff(dim=0, prepend=torch.zeros_like(upto[:1]))
    weights = copies * scores[best, None].where(copies > 0, -torch.inf).softmax(dim=0)
    return best, weights / weights.sum(dim=0)


def train_step(model: Model, tokens: Tensor, labels: Tensor) -> None:
    """Do one step of SGD on the mean of 1 − y·f(x), the loss whose gradient the paper takes (eq. 17 to 21).

    Args:
        model: changed in place.
        tokens: [B, n].
        labels: [B].
    """
    setting = model.setting
    counts, scores = counted(setting, tokens), model.scores()
    for expert, neurons in enumerate(model.neurons):
        active, inactive = neurons >= 0, neurons[:, :RELEVANT] <= 0  # inactive: those that −o_1 and −o_2 activate
        sigma = activation(neurons)
        best, gate = gates(scores[expert], counts, setting.chosen)
        outer = -labels * model.signs[expert] / len(labels)  # of the loss by the expert's output
        by_token = torch.zeros(len(sigma))
        by_token[best] = gate @ outer
        by_score = sigma * by_token
        by_score[best] -= gate @ (outer * (sigma[best] @ gate))  # the softmax's share
        positive, negative = by_token.split([setting.dim, RELEVANT])
        neurons.addcmul_(active, positive, value=-setting.expert_rate)
        neurons[:, :RELEVANT].addcmul_(inactive, negative, value=setting.expert_rate)
        model.router[expert] -= setting.router_rate * by_score[: setting.dim]
        model.router[expert, :RELEVANT] += setting.router_rate * by_score[setting.dim :]


def train(model: Model, alpha: float, generator: torch.Generator) -> None:
    """Train for T steps, each on fresh sequences."""
    for _ in range(model.setting.steps(alpha)):
        train_step(model, *draw(model.setting, alpha, model.setting.batch, generator))

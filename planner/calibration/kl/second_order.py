"""The cost of rounding an expert, from gradients: the second-order term of a loss, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from planner.calibration.kl.gradients import Labels, backward
from planner.calibration.kl.rounding import changes
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import Routed
from planner.common.progress import Progress

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(gradient [n, hidden], change [n, hidden]) → one number per token [n]."""

Terms = dict[str, torch.Tensor]
"""``<name>_<bits>`` → sums per expert, float64 [experts]; sums over all tokens also have :data:`WEIGHT`."""

WEIGHT = "weight"
"""Σ of the router's weights over an expert's tokens."""


def projected(gradient: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Return ½ (g·Δ)²: with labels drawn from the model, its mean is the KL divergence to second order.

    KL(p ‖ p') ≈ ½ Δzᵀ F Δz for a change Δz of the logits, F = E[s sᵀ] the Fisher information, s = ∂ log p(y) / ∂z with
    y drawn from p. Terms between different tokens are left out, because they have no preferred sign.
    """
    return (gradient * change).sum(dim=1).square() / 2


def isotropic(gradient: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Return ½ ‖g‖²‖Δ‖², which varies far less from token to token than :func:`projected`.

    Up to a factor, it would be the same if changes had no preferred direction.
    """
    return gradient.square().sum(dim=1) * change.square().sum(dim=1) / 2


def elementwise(gradient: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Return Σ g²Δ² over the hidden dimension: GEMQ's coefficient (arXiv 2605.23078), with the text's own labels."""
    return (gradient.square() * change.square()).sum(dim=1)


def second_order(
    decoder: Decoder,
    store: HiddenStates,
    tokens: torch.Tensor,
    widths: Sequence[int],
    terms: Mapping[str, Term],
    labels: Labels,
    seed: int,
    progress: Progress,
    first: int | None = None,
) -> dict[str, tuple[Terms, Terms]]:
    """Return the sums of some terms over the tokens of each expert.

    Args:
        decoder: the model.
        store: see :func:`planner.calibration.kl.gradients.backward`.
        tokens: int64 [sequences, length].
        widths: bit widths to round to.
        terms: name → term to sum.
        labels: next tokens in the loss.
        seed: seed of drawn labels.
        progress: shows the progress.
        first: number of first sequences that also get sums of their own; None takes all.

    Returns:
        Experts prefix → (sums over all tokens, sums over the first sequences).
    """
    limit = (len(tokens) if first is None else first) * tokens.shape[1]
    found: dict[str, tuple[Terms, Terms]] = {}
    steps = backward(decoder, store, tokens, labels, seed)
    for step in progress.track(steps, "gradients", len(decoder.moe)):
        layer = decoder.moe[step.index]
        names = [f"{name}_{bits}" for name in terms for bits in widths]
        every, some = ({name: torch.zeros(layer.num_experts, dtype=torch.float64) for name in names} for _ in range(2))
        for expert in range(layer.num_experts):
            for bits, places, change in changes(decoder, layer, expert, step.routed, widths):
                gradient = step.routed.outputs[places].to(change)
                early = places < limit
                for name, term in terms.items():
                    values = term(gradient, change).double().cpu()
                    every[f"{name}_{bits}"][expert] += values.sum()
                    some[f"{name}_{bits}"][expert] += values[early].sum()
        every[WEIGHT] = torch.tensor([_weight(step.routed, expert) for expert in range(layer.num_experts)])
        found[layer.prefix] = (every, some)
    return found


def _weight(routed: Routed, expert: int) -> float:
    return float(routed.weights[routed.ids == expert].sum())

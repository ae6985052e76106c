"""Compare two models token by token: likelihood, KL divergence, the most likely token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vllm_moeq.format import CheckpointError

RESAMPLES = 1000
"""Number of bootstrap samples of sequences for a standard error."""

LARGEST_LOSS = 500.0
"""Nats per token. A guess among a million tokens costs 14; exp of more than 709 is no number."""


@dataclass(frozen=True)
class Score:
    """The score of one model on one text. Errors are standard errors over sequences, by bootstrap.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token.
        perplexity_error: standard error of ``perplexity``.
        kl: mean over tokens of KL(reference ‖ model), in nats.
        kl_error: standard error of ``kl``.
        kl_median: median of the KL divergence over tokens.
        kl_99: 99th percentile of the KL divergence over tokens.
        kl_max: maximum of the KL divergence over tokens.
        same_top: share of tokens for which model and reference have the same most likely next token.
        same_top_error: standard error of ``same_top``.
        tokens: number of predicted tokens.
    """

    perplexity: float
    perplexity_error: float
    kl: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: float
    same_top_error: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def token_losses(likely: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each next token [n], on the CPU.

    Args:
        likely: log-probabilities [n, vocabulary].
        targets: next tokens, int64 [n]; −1 marks positions without one, where the result has no meaning.
    """
    chosen = targets.clamp_min(0)[:, None].to(likely.device)
    return -likely.gather(1, chosen)[:, 0].cpu()


def token_distances(reference: torch.Tensor, likely: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(reference ‖ model) in nats [n], and whether the most likely token is the same, bool [n], on the CPU.

    Args:
        reference: log-probabilities of the reference [n, vocabulary].
        likely: log-probabilities of the model [n, vocabulary].
    """
    divergence = (reference.exp() * (reference - likely)).sum(dim=-1)
    return divergence.cpu(), (likely.argmax(dim=-1) == reference.argmax(dim=-1)).cpu()


def refuse_not_finite(who: object, loss: torch.Tensor, divergence: torch.Tensor | None = None) -> None:
    """Refuse a model whose outputs are infinite or no numbers: its perplexity would mean nothing.

    Args:
        who: the model, for the message.
        loss: negative log-likelihoods of known tokens.
        divergence: their KL divergences from a reference whose outputs are finite, if there is one.

    Raises:
        CheckpointError: naming the model.
    """
    mean = float(loss.double().mean())
    if not mean <= LARGEST_LOSS:
        raise CheckpointError(
            f"{who}: its outputs on the text are not finite: expected a loss of at most {LARGEST_LOSS:g} nats per "
            f"token, found {mean:g}"
        )
    if divergence is not None and not bool(torch.isfinite(divergence).all()):
        found = float(divergence[~torch.isfinite(divergence)][0])
        raise CheckpointError(
            f"{who}: its outputs on the text are not finite: expected a KL divergence to the reference, found {found:g}"
        )


def summarize(loss: torch.Tensor, divergence: torch.Tensor, same: torch.Tensor, known: torch.Tensor) -> Score:
    """Return the score of one model from its values per token [sequences, length]. Only ``known`` tokens count."""
    tokens = divergence[known].double().clamp_min(0)  # rounding may leave −1e-9
    perplexity, perplexity_error = perplexity_of(loss, known)
    kl, kl_error = mean_of(divergence, known)
    same_top, same_top_error = mean_of(same, known)
    return Score(
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        kl=kl,
        kl_error=kl_error,
        kl_median=float(tokens.median()),
        kl_99=float(np.quantile(tokens.numpy(), 0.99)),
        kl_max=float(tokens.max()),
        same_top=same_top,
        same_top_error=same_top_error,
        tokens=int(known.sum()),
    )


def perplexity_of(loss: torch.Tensor, known: torch.Tensor) -> tuple[float, float]:
    """Return the perplexity and its standard error; see :func:`summarize` for the arguments."""
    mean, error = mean_of(loss, known)
    return math.exp(mean), math.exp(mean) * error


def mean_of(values: torch.Tensor, known: torch.Tensor) -> tuple[float, float]:
    """Return the mean over known tokens, and its standard error by a bootstrap over whole sequences."""
    counts = known.sum(dim=1).double()
    sums = (values * known).sum(dim=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    error = (sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)).std()
    return float(sums.sum() / counts.sum()), float(error)


def windows(ids: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a text into windows; return inputs and next tokens, int64 [n, length] each.

    Each token is predicted from the tokens before it in its window. The last window is padded: inputs with token 0,
    which no earlier token sees, and next tokens with −1.
    """
    text = torch.tensor(ids)
    count = math.ceil((len(text) - 1) / length)
    inputs, targets = torch.zeros(count * length, dtype=torch.int64), torch.full((count * length,), -1)
    inputs[: len(text) - 1], targets[: len(text) - 1] = text[:-1], text[1:]
    return inputs.view(count, length), targets.view(count, length)

"""How far a model is from the original, token by token: likelihood, KL divergence, the most likely token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from planner.calibration.decoder import Decoder
from planner.calibration.gradients import head_rows

RESAMPLES = 1000
"""Bootstrap samples of sequences behind an error."""


@dataclass(frozen=True)
class Score:
    """One model on one text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token.
        perplexity_error: its standard error over sequences, by bootstrap.
        kl: mean over tokens of KL(original ‖ model), nats.
        kl_error: its standard error over sequences.
        kl_median: of the tokens.
        kl_99: 99th percentile of the tokens.
        kl_max: of the tokens.
        same_top: share of tokens for which the most likely next token is the original's.
        tokens: how many were predicted.
    """

    perplexity: float
    perplexity_error: float
    kl: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def score(decoder: Decoder, reference: torch.Tensor, others: torch.Tensor, targets: torch.Tensor) -> list[Score]:
    """Return the score of each model.

    Args:
        decoder: has the head, the same for all.
        reference: the original's last layer [sequences, length, hidden].
        others: the models' [models, sequences, length, hidden].
        targets: the next tokens, int64 [sequences, length], −1 where there is none.
    """
    shape = (len(others), targets.numel())
    loss, divergence = torch.zeros(shape), torch.zeros(shape)
    same = torch.zeros(shape, dtype=torch.bool)
    exact, flat, wanted = reference.flatten(0, 1), others.flatten(1, 2), targets.flatten()
    with torch.no_grad(), decoder.head() as logits:
        for rows in torch.arange(len(wanted)).split(head_rows(decoder)):
            original = logits(exact[rows]).log_softmax(dim=-1)
            weights, top = original.exp(), original.argmax(dim=-1)
            chosen = wanted[rows].clamp_min(0)[:, None].to(original.device)
            for number in range(len(others)):
                likely = logits(flat[number][rows]).log_softmax(dim=-1)
                loss[number, rows] = -likely.gather(1, chosen)[:, 0].cpu()
                divergence[number, rows] = (weights * (original - likely)).sum(dim=-1).cpu()
                same[number, rows] = (likely.argmax(dim=-1) == top).cpu()
    known = targets >= 0
    return [
        summarize(
            loss[number].view_as(targets), divergence[number].view_as(targets), same[number].view_as(targets), known
        )
        for number in range(len(others))
    ]


def summarize(loss: torch.Tensor, divergence: torch.Tensor, same: torch.Tensor, known: torch.Tensor) -> Score:
    """Return the score of one model from its values per token [sequences, length]; those not known do not count."""
    counts = known.sum(dim=1).double()
    losses, divergences = ((value * known).sum(dim=1).double() for value in (loss, divergence))
    tokens = divergence[known].double().clamp_min(0)  # rounding may leave −1e-9
    mean = float(losses.sum() / counts.sum())
    return Score(
        perplexity=math.exp(mean),
        perplexity_error=math.exp(mean) * _error(losses, counts),
        kl=float(divergences.sum() / counts.sum()),
        kl_error=_error(divergences, counts),
        kl_median=float(tokens.median()),
        kl_99=float(torch.quantile(tokens[: 1 << 24], 0.99)) if len(tokens) <= 1 << 24 else float(tokens.max()),
        kl_max=float(tokens.max()),
        same_top=float(same[known].double().mean()),
        tokens=int(counts.sum()),
    )


def _error(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """Return the standard error of Σ sums / Σ counts when whole sequences are drawn again."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    return float((sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)).std())


def windows(ids: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a text into windows: inputs [n, length] and the tokens that follow, −1 behind the end.

    Each token is predicted from those before it in its window. The last window is filled up with token 0, which no
    earlier token sees.
    """
    text = torch.tensor(ids)
    count = math.ceil((len(text) - 1) / length)
    inputs, targets = torch.zeros(count * length, dtype=torch.int64), torch.full((count * length,), -1)
    inputs[: len(text) - 1], targets[: len(text) - 1] = text[:-1], text[1:]
    return inputs.view(count, length), targets.view(count, length)

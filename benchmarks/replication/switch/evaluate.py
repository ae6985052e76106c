"""This module measures how well a Switch Transformer describes functions: ROUGE-2 and the right answer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from torch.nn import functional

from benchmarks.replication.switch.text import TARGET_TOKENS, Batch, Text, collate, encode_examples
from benchmarks.replication.switch.train import Model
from planner.output.files import write_json
from vllm_moeq.format import read_json

BATCH = 256
RESAMPLES = 2000


@dataclass(frozen=True)
class Outcome:
    """A model on the held-out examples, a number or a text for each.

    Attributes:
        rouge2: F-measure × 100 of greedy generation, with stems.
        nll: negative log-likelihood of the target, in nats.
        tokens: number of tokens of the target.
        written: the generated text.
    """

    rouge2: list[float]
    nll: list[float]
    tokens: list[int]
    written: list[str]

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return sum(self.nll) / sum(self.tokens)


@torch.inference_mode()
def write(model: Model, text: Text, batch: Batch) -> list[str]:
    """Return what the model writes greedily."""
    ids = model.generate(
        input_ids=batch.source,
        attention_mask=batch.mask,
        max_new_tokens=TARGET_TOKENS,
        do_sample=False,
        num_beams=1,
    )
    return text.tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.inference_mode()
def likelihood(model: Model, batch: Batch) -> tuple[list[float], list[int]]:
    """Return the negative log-likelihood of every target, and its tokens."""
    inputs = model.prepare_decoder_input_ids_from_labels(batch.labels)
    logits = model(input_ids=batch.source, attention_mask=batch.mask, decoder_input_ids=inputs, use_cache=False).logits
    each = functional.cross_entropy(logits.mT, batch.labels, reduction="none")
    return each.sum(dim=1).tolist(), (batch.labels != -100).sum(dim=1).tolist()


def evaluate(model: Model, text: Text) -> Outcome:
    """Return how a model does on the held-out examples."""
    pairs = encode_examples(text, text.held_out)
    by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    found: dict[int, tuple[float, float, int, str]] = {}
    for begin in range(0, len(pairs), BATCH):
        places = by_length[begin : begin + BATCH]
        batch = collate([pairs[i] for i in places], int(text.tokenizer.pad_token_id))
        for i, line, nll, tokens in zip(places, write(model, text, batch), *likelihood(model, batch), strict=True):
            rouge = scorer.score(text.held_out[i].target, line)["rouge2"].fmeasure
            found[i] = (100 * rouge, nll, tokens, line)
    return Outcome(*(list(column) for column in zip(*(found[i] for i in range(len(pairs))), strict=True)))


def remembered(path: Path, model: Model, text: Text) -> Outcome:
    """Return what :func:`evaluate` does; once for each path."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, vars(evaluate(model, text)))
    return Outcome(**read_json(path))


class Bootstrap:
    """Intervals that hold for other examples of the same kind; all means see the same resamples.

    Args:
        examples: how many there are.
        seed: the seed of the resamples.
    """

    def __init__(self, examples: int, seed: int) -> None:
        drawn = np.random.default_rng(seed).integers(examples, size=(RESAMPLES, examples))
        self._times = np.stack([np.bincount(row, minlength=examples) for row in drawn]).astype(np.float64)

    def interval(self, values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
        """Return the central 95% of Σ values / Σ weights over resamples; weights are 1 unless given."""
        above: NDArray[np.float64] = self._times @ np.asarray(values, dtype=np.float64)
        below = self._times @ np.asarray(weights if weights is not None else np.ones(len(values)))
        low, high = np.quantile(above / below, (0.025, 0.975))
        return float(low), float(high)

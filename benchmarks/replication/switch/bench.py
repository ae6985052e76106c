"""This module quantizes one fine-tuned model of ``run.py`` in all ways that are compared, and evaluates the results."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replication.switch.evaluate import Bootstrap, Outcome, remembered
from benchmarks.replication.switch.quantize import (
    OTHER_BITS,
    Order,
    Shelf,
    Widths,
    assign,
    random_order,
    score,
    uniform,
)
from benchmarks.replication.switch.stages import Trained
from benchmarks.replication.switch.text import Text, example_batches
from benchmarks.replication.switch.train import Model

OURS = "change + MaxVar"
"""The paper's rule, from which differences are taken."""

CALIBRATION = 32
"""Batches of training examples over which experts' tokens are counted."""

Row = dict[str, Any]


def digest_of(model: Model) -> str:
    """Return a digest of a model's weights."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


class Bench:
    """One fine-tuned model under test.

    Args:
        text: to calibrate and evaluate on.
        trained: the model.
        start: the kind of its routers before fine-tuning.
        folder: the folder that keeps outcomes.
        quick: little calibration.
    """

    def __init__(self, text: Text, trained: Trained, start: str, folder: Path, quick: bool) -> None:
        self.text, self.start, self.folder = text, start, folder
        self.seed, batch = trained.facts["recipe"]["seed"], trained.facts["recipe"]["batch"]
        self.weights = digest_of(trained.model)
        self.shelf = Shelf(trained.model)
        calibration = example_batches(text, batch, 4 if quick else CALIBRATION, self.seed + 1)
        self.scores = score(trained.model, trained.initial, calibration)
        self.bootstrap = Bootstrap(len(text.held_out), self.seed)
        self.outcomes: dict[tuple[str, float, int], Outcome] = {}

    def row(
        self, method: str, average: Fraction, widths: Widths | None, seed: int = 0, other_bits: int = OTHER_BITS
    ) -> Row:
        """Evaluate a model and return its row; models that are equal are evaluated once."""
        asked = json.dumps([self.weights, widths, other_bits])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        original = widths is None and other_bits == 32
        model = self.shelf.model if original else self.shelf.quantized(widths, other_bits)
        began = time.monotonic()
        outcome = remembered(self.folder / f"{digest}.json", model, self.text)
        self.outcomes[method, float(average), seed] = outcome
        low, high = self.bootstrap.interval(outcome.rouge2)
        loss_low, loss_high = self.bootstrap.interval(outcome.nll, outcome.tokens)
        rouge2 = sum(outcome.rouge2) / len(outcome.rouge2)
        print(
            f"{self.start} {method} {float(average):g}: ROUGE-2 {rouge2:.2f}, loss {outcome.loss:.4f}, "
            f"{time.monotonic() - began:.1f} s", flush=True,
        )  # fmt: skip
        return {
            "start": self.start, "method": method, "average": float(average), "seed": seed,
            "rouge2": rouge2, "rouge2_low": low, "rouge2_high": high,
            "loss": outcome.loss, "loss_low": loss_low, "loss_high": loss_high,
            "model": digest, "widths": widths,
        }  # fmt: skip

    def ends(self, widths: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of models whose experts are equally wide."""
        yield self.row("original", Fraction(32), None, other_bits=32)
        yield self.row("all but experts at 8 bits", Fraction(32), None)
        for bits in widths:
            yield self.row("uniform", Fraction(bits), uniform(self.shelf.model, bits))

    def mixed(
        self, found: dict[str, Order], choices: Sequence[int], averages: Sequence[str], seeds: int
    ) -> Iterator[Row]:
        """Yield a row per method, average and seed."""
        for average in map(Fraction, averages):
            for method, order in found.items():
                yield self.row(method, average, assign(order, average, choices))
            for seed in range(self.seed * seeds, (self.seed + 1) * seeds):
                yield self.row("random", average, assign(random_order(self.scores, seed), average, choices), seed)

    def differences(self, averages: Sequence[str]) -> list[Row]:
        """Return every method minus the paper's: mean over averages and seeds, on the same resamples of examples."""
        same: dict[str, list[Outcome]] = {}
        for (method, average, _), outcome in self.outcomes.items():
            if str(average) in averages:
                same.setdefault(method, []).append(outcome)
        tokens = same[OURS][0].tokens
        mean = {
            method: tuple(np.mean([getattr(one, name) for one in found], axis=0) for name in ("rouge2", "nll"))
            for method, found in same.items()
        }
        rows = []
        for method, sides in mean.items():
            rouge2, nll = (side - ours for side, ours in zip(sides, mean[OURS], strict=True))
            row = {"start": self.start, "method": method, "rouge2": rouge2.mean(), "loss": nll.sum() / sum(tokens)}
            row["rouge2_low"], row["rouge2_high"] = self.bootstrap.interval(rouge2)
            row["loss_low"], row["loss_high"] = self.bootstrap.interval(nll, tokens)
            if method != OURS:
                rows.append(row)
        return rows

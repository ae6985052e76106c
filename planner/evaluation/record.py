"""evaluation.json: the measurements on a checkpoint, in its folder, for its report and model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from planner.evaluation.lm_eval_backends import TASK_BACKENDS
from planner.output.files import read_as, write_json
from vllm_moeq.format.fields import Count, Strict
from vllm_moeq.format.files import check_inside

FILE = "evaluation.json"
Text = Annotated[str, Field(max_length=4096)]
Positive = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Perplexity = Annotated[float, Field(ge=0.99)]
"""At least 1, but for rounding."""

AGREE = 1e-4
"""Relative tolerance. One model's perplexities from different batch sizes or devices differ by less."""

MAX_RESULTS = 4096


class Divergence(Strict):
    """KL(reference ‖ model) per token of a text in nats, and how often both models predict the same token.

    ``error`` is the standard error of the mean over windows. ``p99`` is the 99th percentile over tokens. ``same_top``
    is the share of tokens for which both models have the same most likely next token, ``same_top_error`` its standard
    error.
    """

    mean: float
    error: Positive
    median: float
    p99: float
    max: float
    same_top: Share
    same_top_error: Positive


class TextResult(Strict):
    """The result on a text: perplexity, its standard error over windows, and the distance from a reference, if any."""

    data: Text
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    window: Count
    tokens: Count
    perplexity: Perplexity
    perplexity_error: Positive
    reference: Text | None = None
    reference_perplexity: Perplexity | None = None
    reference_perplexity_error: Positive | None = None
    kl: Divergence | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Key of the text and the way it was read: two results with equal keys measure the same."""
        return self.sha256, self.window, self.tokens

    def beside(self, older: TextResult) -> TextResult:
        """Return this result. If it has no reference and its perplexity equals the older one's, copy that reference."""
        if self.kl is not None or not math.isclose(self.perplexity, older.perplexity, rel_tol=AGREE):
            return self
        names = ("reference", "reference_perplexity", "reference_perplexity_error", "kl")
        return self.model_copy(update={name: getattr(older, name) for name in names})


def _known_backend(name: str) -> str:
    if name not in TASK_BACKENDS:
        raise ValueError(f"expected one of {', '.join(TASK_BACKENDS)}")
    return name


class TaskResult(Strict):
    """One metric of one lm-eval task, in the metric's own unit. An accuracy is between 0 and 1."""

    task: Text
    metric: Text
    value: float
    stderr: Positive | None = None
    samples: Count
    limit: Count | None = None
    backend: Annotated[str, AfterValidator(_known_backend)]


class Evaluations(Strict):
    """The contents of evaluation.json, version 1."""

    version: Literal[1] = 1
    texts: Annotated[list[TextResult], Field(max_length=MAX_RESULTS)] = Field(default_factory=list)
    tasks: Annotated[list[TaskResult], Field(max_length=MAX_RESULTS)] = Field(default_factory=list)

    def merged(self, texts: list[TextResult], tasks: list[TaskResult]) -> Evaluations:
        """Return these and newer results. A newer result replaces an older one of the same text or task and settings.

        A newer result without a reference keeps the older result's reference; see :meth:`TextResult.beside`.
        """
        known = {it.key: it for it in self.texts}
        newer_texts = {it.key for it in texts}
        newer_tasks = {(it.task, it.metric, it.limit, it.backend) for it in tasks}
        return Evaluations(
            texts=[
                *(it for it in self.texts if it.key not in newer_texts),
                *(it.beside(known[it.key]) if it.key in known else it for it in texts),
            ],
            tasks=[*(it for it in self.tasks if (it.task, it.metric, it.limit, it.backend) not in newer_tasks), *tasks],
        )

    def write(self, folder: Path) -> None:
        """Write evaluation.json into a checkpoint's folder, atomically."""
        write_json(folder / FILE, self.model_dump(mode="json", exclude_none=True))


def read_evaluations(folder: Path) -> Evaluations:
    """Return the contents of a checkpoint's evaluation.json; an empty record if there is no file.

    Raises:
        CheckpointError: a link that leads out of the folder.
        ConfigError: a damaged file; the message names it and the first violation.
    """
    path = folder / FILE
    check_inside(path)
    return read_as(path, Evaluations) if path.exists() else Evaluations()

"""Evaluate a model on a text and on tasks. Unfinished results are in one folder, so that a run can continue."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.common.memory import explained_if_out_of_memory
from planner.common.progress import Progress
from planner.evaluation.lm_eval_backends import DEFAULT_TASK_BACKEND
from planner.evaluation.lm_eval_task_files import is_file_name
from planner.evaluation.lm_eval_tasks import run_tasks
from planner.evaluation.passes import TextScore, evaluate_text
from planner.evaluation.perplexity import cut, read_tokens
from planner.evaluation.reader import Reader, open_reader
from planner.evaluation.record import Divergence, TaskResult, TextResult
from planner.model.source import SourceModel
from planner.output.unfinished import PartialRun
from planner.quantization.runners.choose import read_devices
from planner.text.documents import digest
from planner.text.tokenizer import load_tokenizer
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class Text:
    """A text to evaluate a model on.

    Attributes:
        name: name of the text in results.
        content: the text itself, in one or several documents.
        window: tokens of context.
        max_tokens: maximum number of tokens; None for all.
        reference: folder of the reference model; None for no reference.
        reference_name: name of the reference in results.
    """

    name: str
    content: tuple[str, ...]
    window: int
    max_tokens: int | None = None
    reference: Path | None = None
    reference_name: str | None = None

    @property
    def sha256(self) -> str:
        """Digest of the whole text."""
        return digest(self.content)


@dataclass(frozen=True)
class EvaluationRequest:
    """The measurements to make on a model.

    Attributes:
        folder: the model's folder.
        text: the text; None for no text.
        tasks: names of lm-eval tasks, or task files.
        limit: maximum number of documents per task; None for all.
        backend: backend for tasks.
        batch_size: windows of the text, or sequences of tasks, at a time; None for the default. It changes results by
            rounding only.
        device: devices as ``--device`` takes them; the text is read on the first one.
    """

    folder: Path
    text: Text | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    backend: str = DEFAULT_TASK_BACKEND
    batch_size: int | None = None
    device: str = "cpu"

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that decides the results; messages show the keys."""
        text, reference = self.text, None if self.text is None else self.text.reference
        return {
            "model": _digest(self.folder),
            "data": None if text is None else text.sha256,
            "reference": None if reference is None else _digest(reference),
            "window": None if text is None else [text.window, text.max_tokens],
            "tasks": [_task_digest(task) for task in self.tasks],
            "limit": self.limit,
            "backend": self.backend,
            "device": torch.device(read_devices(self.device)[0]).type,
        }


def _digest(folder: Path) -> str:
    with SourceModel(folder) as model:
        return model.fingerprint()


def _task_digest(task: str) -> str:
    """Return a task's name; for a task file, add a digest of its contents."""
    path = Path(task)
    content = path.read_bytes() if is_file_name(task) and path.is_file() else b""
    return f"{task} {hashlib.sha256(content).hexdigest()[:16]}" if content else task


@dataclass(frozen=True)
class Found:
    """The results of an evaluation."""

    text: TextResult | None
    tasks: list[TaskResult]


def evaluate(wanted: EvaluationRequest, partial: PartialRun, progress: Progress) -> Found:
    """Run the requested measurements. Continue a killed run from the folder of ``partial``; the folder is not deleted.

    Raises:
        MoeqError: models with different vocabularies, a damaged checkpoint, an unknown task, too little memory.
    """
    with explained_if_out_of_memory(f"on {wanted.device}; what is finished is kept; a smaller --batch-size takes less"):
        text = None if wanted.text is None else _read(wanted, wanted.text, partial.folder, progress)
        tasks: list[TaskResult] = []
        if wanted.tasks:
            tasks = run_tasks(
                wanted.folder, wanted.tasks, limit=wanted.limit, batch_size=wanted.batch_size, device=wanted.device,
                backend=wanted.backend, store=partial.folder, progress=progress,
            )  # fmt: skip
    return Found(text, tasks)


def finish(partial: PartialRun) -> None:
    """Remove the folder of a finished run."""
    shutil.rmtree(partial.folder, ignore_errors=True)
    partial.release()


def _read(wanted: EvaluationRequest, text: Text, folder: Path, progress: Progress) -> TextResult:
    ids = read_tokens(wanted.folder, text.content, text.max_tokens, f"--data {text.name}")
    device = torch.device(read_devices(wanted.device)[0])
    with ExitStack() as stack:
        model = stack.enter_context(closing(open_reader(wanted.folder, device, wanted.batch_size)))
        reference = None
        if text.reference is not None:
            reference = stack.enter_context(closing(open_reader(text.reference, device, wanted.batch_size)))
            _check_vocabularies(model, reference)
        return _result(text, evaluate_text(model, reference, *cut(ids, text.window), folder, progress))


def _check_vocabularies(model: Reader, reference: Reader) -> None:
    """Refuse a reference with another vocabulary than the model's."""
    expected = f"--reference {reference.folder}: expected the vocabulary of {model.folder}"
    if reference.vocabulary != model.vocabulary:
        raise UsageError(f"{expected}, {model.vocabulary:,} tokens, found {reference.vocabulary:,}")
    own, other = (load_tokenizer(reader.folder).get_vocab() for reader in (model, reference))
    differs = [token for token in sorted(own.keys() | other.keys()) if own.get(token) != other.get(token)]
    if differs:
        token = differs[0]
        raise UsageError(
            f"{expected}, found another: token {token!r} has the number {own.get(token)} in the model, "
            f"{other.get(token)} in the reference"
        )


def _result(text: Text, score: TextScore) -> TextResult:
    model = score.model
    result = TextResult(
        data=text.name,
        sha256=text.sha256,
        window=text.window,
        tokens=model.tokens,
        perplexity=model.perplexity,
        perplexity_error=model.perplexity_error,
    )
    if score.reference is None:
        return result
    perplexity, error = score.reference
    divergence = Divergence(
        mean=model.kl,
        error=model.kl_error,
        median=model.kl_median,
        p99=model.kl_99,
        max=model.kl_max,
        same_top=model.same_top,
        same_top_error=model.same_top_error,
    )
    more = {"reference_perplexity": perplexity, "reference_perplexity_error": error, "kl": divergence}
    return result.model_copy(update={"reference": text.reference_name, **more})

"""``planner.evaluate``: measure how good a model is."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from planner.api.call import takes
from planner.api.keywords.common import PathName, ProgressKeyword, Tokens
from planner.api.keywords.running import ResumeKeyword, first_device
from planner.api.keywords.tasks import TaskKeywords
from planner.api.results import Estimate, Evaluated
from planner.calibration.reading.text import longest_text
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.estimates.evaluation import eval_needs
from planner.evaluation.lm_eval_backends import TASK_BACKENDS
from planner.evaluation.lm_eval_tasks import check_tasks
from planner.evaluation.perplexity import read_texts, read_tokens
from planner.evaluation.record import FILE, read_evaluations
from planner.evaluation.run import EvaluationRequest, Text, finish
from planner.evaluation.run import evaluate as measure
from planner.model.hub import resolve_model
from planner.model.quantized import is_moeq
from planner.model.skeleton import open_folder
from planner.model.whole import check_folder
from planner.output.files import write_json
from planner.output.unfinished import PartialRun
from planner.reporting.card import refresh_card
from vllm_moeq.format import UsageError, read_config_json

WINDOW = 512
"""Tokens of context, if the model can read as many."""


@dataclass(frozen=True)
class EvaluateKeywords(ProgressKeyword, ResumeKeyword, TaskKeywords):
    """The arguments of :func:`evaluate`.

    Attributes:
        model: folder or Hub name (owner/name).
        data: file of the text to predict: text, JSON, CSV or parquet.
        reference: model to diverge from, such as the original.
        window: tokens of context; None is 512, or what the model can read.
        max_tokens: stop after so many tokens; None for all.
        device: device of the model: ``cpu``, ``cuda`` or one GPU such as ``cuda:1``; for vLLM a list.
        output: file for the result, as JSON.
        save: keep the result in the evaluation.json of a checkpoint of moeq, and in its card.
    """

    model: PathName
    _: KW_ONLY
    data: PathName | None = None
    reference: PathName | None = None
    window: Tokens | None = None
    max_tokens: Tokens | None = None
    device: str = "cpu"
    output: PathName | None = None
    save: bool = True

    def read_text(self, folder: Path, dry_run: bool) -> Text | None:
        """Return the text, if there is one, for a model in a folder.

        Raises:
            MoeqError: no such file or reference, or a window that the model cannot read.
        """
        if self.data is None:
            return None
        data = Path(self.data)
        content = read_texts(data, folder)
        with open_folder(folder, dry_run) as source:
            longest = longest_text(source)
        if self.window is not None and self.window > longest:
            raise UsageError(f"--window: expected at most {longest}, the model's longest text, found {self.window}")
        window = self.window or min(WINDOW, longest)
        if self.reference is None:
            return Text(data.name, content, window, self.max_tokens)
        reference = str(self.reference)
        other = resolve_model(reference, weights=not dry_run)
        return Text(data.name, content, window, self.max_tokens, other, _name(reference))


@takes(EvaluateKeywords, "eval")
def evaluate(wanted: EvaluateKeywords) -> Evaluated:
    """Measure a model on a text and on tasks, as ``moeq eval`` does. Continue a killed run.

    A text gives the perplexity, and with ``reference`` the KL divergence to it.

    Raises:
        MoeqError: arguments that cannot be met, a damaged model or text, an unknown task; its message is one line.
    """
    model, progress = str(wanted.model), wanted.display()
    asked = _request(wanted, dry_run=False)
    _first_device(asked)
    read, output = asked.text, None if wanted.output is None else Path(wanted.output)
    for path in (asked.folder, *([read.reference] if read is not None and read.reference is not None else [])):
        unchecked = check_folder(path)
        if unchecked is not None:
            progress.line(f"note: {path}: only experts were checked for completeness: {unchecked}")
    kept = _kept_in(model, asked.folder, progress) if wanted.save else None
    return_large_blocks()
    partial = PartialRun(output or _unnamed(model, asked), asked.fingerprint(), wanted.resume)
    try:
        found = measure(asked, partial, progress)
        data = None if wanted.data is None else str(wanted.data)
        result = Evaluated(model, data, found.text, tuple(found.tasks))
        _keep(result, output, kept)
    except BaseException:
        partial.abandon()
        raise
    finish(partial)
    return result


def estimate_evaluate(wanted: EvaluateKeywords) -> Estimate:
    """Return what reading the text would take.

    Raises:
        MoeqError: as :func:`evaluate` does, or there is no text, or there are tasks, whose documents nobody knows yet.
    """
    asked = _request(wanted, dry_run=True)
    device, text = _first_device(asked), asked.text
    if text is None or asked.tasks:
        raise UsageError("--dry-run: expected --data alone, whose size is known, found tasks")
    folders = [asked.folder] if text.reference is None else [asked.folder, text.reference]
    tokens = len(read_tokens(asked.folder, text.content, text.max_tokens, f"--data {text.name}"))
    return Estimate(eval_needs(folders, tokens, text.window, device))


def _request(wanted: EvaluateKeywords, dry_run: bool) -> EvaluationRequest:
    """Return the measurements to make.

    Raises:
        MoeqError: nothing to measure, an unknown task, a damaged model or text.
    """
    folder, tasks = resolve_model(str(wanted.model), weights=not dry_run), wanted.task_names()
    if wanted.data is None and not tasks:
        raise UsageError("--data, --tasks, --suite: expected at least one of them, found none")
    if wanted.data is not None and tasks and not dry_run:
        check_tasks(tasks)  # the text comes first, and takes hours
    text = wanted.read_text(folder, dry_run)
    return EvaluationRequest(folder, text, tasks, wanted.limit, wanted.backend, wanted.batch_size, wanted.device)


def _first_device(wanted: EvaluationRequest) -> torch.device:
    """Return the device that reads texts.

    Raises:
        UsageError: devices that are not there, or several where one is used.
    """
    if "," in wanted.device and not (wanted.tasks and TASK_BACKENDS[wanted.backend].several_devices):
        names = " or ".join(name for name, row in TASK_BACKENDS.items() if row.several_devices)
        raise UsageError(f"--device: expected one device (--backend {names} takes several), found {wanted.device!r}")
    return first_device(wanted.device)


def _keep(result: Evaluated, output: Path | None, kept: Path | None) -> None:
    """Write the result to a file, and add it to the results that a checkpoint keeps, if any."""
    if output is not None:
        write_json(output, result.as_dict(), new=True)
    if kept is not None:
        texts = [] if result.text is None else [result.text]
        read_evaluations(kept).merged(texts, list(result.tasks)).write(kept)
        refresh_card(kept)


def _name(model: str) -> str:
    """Return a model's name on the Hub, or the name of its folder."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _kept_in(model: str, folder: Path, progress: Progress) -> Path | None:
    """Return the folder whose evaluation.json gets the results: a checkpoint of moeq, but none in a Hub cache.

    Raises:
        ConfigError: its evaluation.json is damaged.
    """
    if not Path(model).is_dir() or not is_moeq(read_config_json(folder / "config.json")):
        return None
    read_evaluations(folder)
    if os.access(folder, os.W_OK):
        return folder
    progress.line(f"note: {folder} cannot be written: its {FILE} stays as it is")
    return None


def _unnamed(model: str, wanted: EvaluationRequest) -> Path:
    """Return the path that names an unfinished run without ``-o``; it differs from that of any other run."""
    digest = hashlib.sha256(json.dumps(wanted.fingerprint()).encode()).hexdigest()[:8]
    return Path.cwd() / f"{_name(model).replace('/', '--')}-eval-{digest}"

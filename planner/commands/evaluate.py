"""``moeq eval``: measure how good a model is."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from planner.calibration.reading.text import longest_text
from planner.commands import show
from planner.commands.flags.common import DryRun, Json, Limit, Model, Resume
from planner.commands.flags.running import first_device
from planner.commands.flatten import OneOf
from planner.commands.show_needs import report_needs
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.common.shown import add_row, say
from planner.estimates import Needs
from planner.estimates.evaluation import eval_needs
from planner.evaluation.lm_eval_backends import TASK_BACKENDS
from planner.evaluation.lm_eval_tasks import PAPER_SUITE, check_tasks
from planner.evaluation.perplexity import read_texts, read_tokens
from planner.evaluation.record import FILE, TextResult, read_evaluations
from planner.evaluation.run import EvaluationRequest, Found, Text, evaluate, finish
from planner.model.hub import resolve_model
from planner.model.quantized import is_moeq
from planner.model.skeleton import open_folder
from planner.model.whole import check_folder
from planner.output.files import write_json
from planner.output.unfinished import PartialRun
from planner.reporting.card import refresh_card
from vllm_moeq.format import UsageError, read_json

WINDOW = 512


SUITES = {"paper": PAPER_SUITE}
"""Lists of tasks by name."""


@dataclass(frozen=True)
class PredictedText:
    """The text that a model predicts."""

    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Text to predict: text, JSON, CSV or parquet.")
    ] = None
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="Model to diverge from, such as the original.")
    ] = None
    window: Annotated[
        int | None, typer.Option("--window", min=2, help=f"Tokens of context [{WINDOW}, or what the model can read].")
    ] = None
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Stop after so many tokens.")] = None

    def read(self, folder: Path, dry_run: bool) -> Text | None:
        """Return the text, if there is one, for a model in a folder.

        Raises:
            MoeqError: no such file or reference, or a window that the model cannot read.
        """
        if self.data is None:
            return None
        content = read_texts(self.data, folder)
        with open_folder(folder, dry_run) as source:
            longest = longest_text(source)
        if self.window is not None and self.window > longest:
            raise UsageError(f"--window: expected at most {longest}, the model's longest text, found {self.window}")
        window = self.window or min(WINDOW, longest)
        if self.reference is None:
            return Text(self.data.name, content, window, self.max_tokens)
        other = resolve_model(self.reference, weights=not dry_run)
        return Text(self.data.name, content, window, self.max_tokens, other, _name(self.reference))


@dataclass(frozen=True)
class TaskFlags:
    """The tasks that a model answers."""

    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="LIST", help="lm-eval tasks, or YAML files, which may run code.")
    ] = None
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help=f"Instead of --tasks; {'; '.join(f'{name}: ' + ', '.join(tasks) for name, tasks in SUITES.items())}.",
        ),
        OneOf(SUITES),
    ] = None
    limit: Limit = None
    backend: Annotated[str, typer.Option("--backend", help="Program that answers tasks."), OneOf(TASK_BACKENDS)] = (
        EvaluationRequest.backend
    )
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Windows, or sequences of tasks, at a time.")
    ] = None

    def names(self) -> tuple[str, ...]:
        """Return the names or files of the tasks, each once.

        Raises:
            UsageError: both flags, or an empty name.
        """
        if self.tasks is not None and self.suite is not None:
            raise UsageError("--tasks and --suite: expected one of them, found both")
        if self.suite is not None:
            return SUITES[self.suite]
        names = () if self.tasks is None else tuple(dict.fromkeys(self.tasks.split(",")))
        if "" in names:
            raise UsageError(f"--tasks: expected names or files such as piqa,arc_easy, found {self.tasks!r}")
        return names


def eval_command(
    model: Model,
    *,
    predicted: PredictedText,
    asked: TaskFlags,
    device: Annotated[
        str,
        typer.Option("--device", help="Device of the model: cpu, cuda or one GPU such as cuda:1; for vLLM a list."),
    ] = "cpu",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="File for the result, as JSON.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help=f"Keep the result in the {FILE} of a checkpoint of moeq.")
    ] = True,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, KL divergence to a reference, and accuracy on tasks. Continues a killed run.

    Example: moeq eval Mixtral-8x7B-2.5bit --data wikitext.txt --reference mistralai/Mixtral-8x7B-v0.1
    """
    progress, folder = Progress(), resolve_model(model, weights=not dry_run)
    tasks = asked.names()
    if predicted.data is None and not tasks:
        raise UsageError("--data, --tasks, --suite: expected at least one of them, found none")
    if predicted.data is not None and tasks and not dry_run:
        check_tasks(tasks)  # the text comes first, and takes hours
    read = predicted.read(folder, dry_run)
    wanted = EvaluationRequest(folder, read, tasks, asked.limit, asked.backend, asked.batch_size, device)
    first = _first_device(wanted)
    if dry_run:
        report_needs("evaluating", _needs(wanted, first), as_json)
        return
    for path in (folder, *([read.reference] if read is not None and read.reference is not None else [])):
        unchecked = check_folder(path)
        if unchecked is not None:
            progress.line(f"note: {path}: only experts were checked for completeness: {unchecked}")
    kept = _kept_in(model, folder, progress) if save else None
    return_large_blocks()
    partial = PartialRun(output or _unnamed(model, wanted), wanted.fingerprint(), resume)
    try:
        found = evaluate(wanted, partial, progress)
        facts = _facts(model, predicted.data, found)
        _keep(found, facts, output, kept)
    except BaseException:
        partial.abandon()
        raise
    finish(partial)
    if as_json:
        show.emit(facts)
    else:
        print_found(found)


def _first_device(wanted: EvaluationRequest) -> torch.device:
    """Return the device that reads texts.

    Raises:
        UsageError: devices that are not there, or several where one is used.
    """
    if "," in wanted.device and not (wanted.tasks and TASK_BACKENDS[wanted.backend].several_devices):
        names = " or ".join(name for name, row in TASK_BACKENDS.items() if row.several_devices)
        raise UsageError(f"--device: expected one device (--backend {names} takes several), found {wanted.device!r}")
    return first_device(wanted.device)


def _keep(found: Found, facts: dict[str, Any], output: Path | None, kept: Path | None) -> None:
    """Write the result to the file of ``--output``, and add it to the results that a checkpoint keeps, if any."""
    if output is not None:
        write_json(output, facts)
    if kept is not None:
        texts = [] if found.text is None else [found.text]
        read_evaluations(kept).merged(texts, found.tasks).write(kept)
        refresh_card(kept)


def _needs(wanted: EvaluationRequest, device: torch.device) -> Needs:
    """Return the disk, memory and time that reading the text takes.

    Raises:
        UsageError: there is no text, or there are tasks, whose documents nobody knows yet.
    """
    text = wanted.text
    if text is None or wanted.tasks:
        raise UsageError("--dry-run: expected --data alone, whose size is known, found tasks")
    folders = [wanted.folder] if text.reference is None else [wanted.folder, text.reference]
    tokens = len(read_tokens(wanted.folder, text.content, text.max_tokens, "--data"))
    return eval_needs(folders, tokens, text.window, device)


def _name(model: str) -> str:
    """Return a model's name on the Hub, or the name of its folder."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _kept_in(model: str, folder: Path, progress: Progress) -> Path | None:
    """Return the folder whose evaluation.json gets the results: a checkpoint of moeq, but none in a Hub cache.

    Raises:
        ConfigError: its evaluation.json is damaged.
    """
    if not Path(model).is_dir() or not is_moeq(read_json(folder / "config.json")):
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


def _facts(model: str, data: Path | None, found: Found) -> dict[str, Any]:
    """Return the result as JSON values."""
    facts: dict[str, Any] = {"model": model}
    if found.text is not None:
        facts |= {**found.text.model_dump(mode="json", exclude_none=True), "data": str(data)}
    if found.tasks:
        facts["tasks"] = [task.model_dump(mode="json", exclude_none=True) for task in found.tasks]
    return facts


def print_found(found: Found) -> None:
    """Print the result: a line per number of a text, a table of tasks."""
    if found.text is not None:
        for line in _lines(found.text):
            say(line)
    if found.tasks:
        table = Table("task", "metric", "value", "documents")
        for task in found.tasks:
            error = "" if task.stderr is None else f" ± {task.stderr:.4f}"
            add_row(table, task.task, task.metric, f"{task.value:.4f}{error}", f"{task.samples:,}")
        Console(highlight=False).print(table)


def _lines(text: TextResult) -> list[str]:
    lines = [
        f"perplexity {text.perplexity:.4f} ± {text.perplexity_error:.4f}, "
        f"{text.tokens:,} tokens of {text.data}, windows of {text.window}"
    ]
    if text.kl is not None:
        kl = text.kl
        lines += [
            f"perplexity {text.reference_perplexity:.4f} ± {text.reference_perplexity_error:.4f} of {text.reference}",
            f"KL divergence {kl.mean:.5f} ± {kl.error:.5f} nats per token; "
            f"median {kl.median:.5f}, 99% {kl.p99:.4f}, largest {kl.max:.3f}",
            f"same most likely token {100 * kl.same_top:.2f}% ± {100 * kl.same_top_error:.2f}%",
        ]
    return lines

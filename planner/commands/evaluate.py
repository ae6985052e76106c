"""``moeq eval``: measure how good a model is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from planner.api.estimating import estimate
from planner.api.evaluating import WINDOW, EvaluateKeywords, evaluate
from planner.api.keywords.tasks import SUITES, TaskKeywords
from planner.api.results import Evaluated
from planner.commands import show
from planner.commands.flags.common import DryRun, Json, Limit, Model, Resume, keywords_of
from planner.commands.flatten import OneOf
from planner.commands.show_needs import report_needs
from planner.common.progress import Progress
from planner.common.shown import add_row, say
from planner.evaluation.lm_eval_backends import TASK_BACKENDS
from planner.evaluation.record import FILE, TextResult


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
        TaskKeywords.backend
    )
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Windows, or sequences of tasks, at a time.")
    ] = None


def eval_command(
    model: Model,
    *,
    predicted: PredictedText,
    asked: TaskFlags,
    device: Annotated[
        str,
        typer.Option("--device", help="Device of the model: cpu, cuda or one GPU such as cuda:1; for vLLM a list."),
    ] = EvaluateKeywords.device,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="New file for the result, as JSON.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help=f"Keep the result in the {FILE} of a checkpoint of moeq.")
    ] = EvaluateKeywords.save,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, KL divergence to a reference, and accuracy on tasks. Continues a killed run.

    Example: moeq eval Mixtral-8x7B-2.5bit --data wikitext.txt --reference mistralai/Mixtral-8x7B-v0.1
    """
    keywords = {**keywords_of(predicted, asked), "device": device, "save": save, "resume": resume}
    if dry_run:
        needs = estimate(evaluate, model, output=output, progress=Progress(), **keywords)
        report_needs("evaluating", needs, as_json)
        return
    found = evaluate(model, output=output, progress=Progress(), **keywords)
    if as_json:
        show.emit(found.as_dict())
    else:
        print_found(found)


def print_found(found: Evaluated) -> None:
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

"""``moeq bench``: how fast vLLM serves a checkpoint, or another model beside it; what a GPU shows of the kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from planner.calibration.reading.text import longest_text
from planner.commands import show
from planner.commands.flags.common import Json
from planner.commands.serve import check_flags
from planner.common.progress import Progress
from planner.common.shown import add_row, say
from planner.evaluation.gpu_suite import archive_of, check_card, check_output, find_script, run_suite
from planner.evaluation.server_start import cache_flags, check_tokenizer, find_checkpoint, value_of
from planner.evaluation.serving_speed import (
    METRICS,
    Endpoint,
    Load,
    better_by,
    check_lengths,
    find_endpoint,
    measure,
)
from planner.evaluation.vllm_server import NAME, Server, quiet_environment
from planner.model.quantized import is_moeq
from planner.model.source import SourceModel
from planner.model.whole import check_folder
from vllm_moeq.format import QUANT_METHOD, UsageError

START_SECONDS = 3600
"""Timeout of a server's start: large models load for many minutes."""

OWN = ("--model", "--host", "--port", "--uds", "--served-model-name", "--api-key", "--skip-tokenizer-init")
"""Flags of vLLM that the benchmark chooses, or cannot do with."""


@dataclass(frozen=True)
class RequestFlags:
    """The requests."""

    requests: Annotated[int, typer.Option("--requests", min=1, help="Number of requests.")] = Load.requests
    at_a_time: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at a time.")] = Load.concurrency
    input_tokens: Annotated[
        int, typer.Option("--input-tokens", min=1, help="Tokens of a prompt; they are drawn at random.")
    ] = Load.input_tokens
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=2, help="Tokens of an answer.")] = (
        Load.output_tokens
    )

    def load(self) -> Load:
        """Return the requests."""
        return Load(self.requests, self.at_a_time, self.input_tokens, self.output_tokens)


@dataclass(frozen=True)
class Served:
    """A model for which a server is started.

    Attributes:
        name: its name, as the user wrote it.
        folder: its folder.
        flags: vLLM's flags.
    """

    name: str
    folder: Path
    flags: list[str]

    @property
    def tokenizer(self) -> str:
        """Folder or name of the tokenizer."""
        return value_of(self.flags, "--tokenizer") or str(self.folder)


def bench_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DIR",
            help="A checkpoint; a second model to compare it with, also in bfloat16; behind --, vLLM's flags for both.",
        ),
    ] = None,
    *,
    requests: RequestFlags,
    url: Annotated[
        str | None, typer.Option("--url", help="A running server of DIR, http://HOST:PORT; without it one is started.")
    ] = None,
    gpu_report: Annotated[
        Path | None,
        typer.Option(
            "--gpu-report",
            metavar="FOLDER",
            help="Folder for the results of the GPU suite, run in a clone instead and packed to be sent.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a checkpoint with vLLM, send requests, print tokens per second and waiting times. Compares two models.

    Example: moeq bench Mixtral-8x7B-2.5bit mistralai/Mixtral-8x7B-v0.1 -- --max-model-len 4096
    """
    if gpu_report is not None:
        raise typer.Exit(_report_gpu(gpu_report))
    words = models or []
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    flags, load, progress = words[len(names) :], requests.load(), Progress()
    if not 1 <= len(names) <= 2:
        raise UsageError(f"DIR: expected one or two models before vLLM's flags, found {' '.join(names) or 'none'}")
    with tempfile.TemporaryDirectory(prefix="moeq-bench-") as work:
        if url is None:
            found = [bench_folder(served, load, Path(work), progress) for served in _checked(names, flags, load)]
        else:
            names, found = _bench_url(url, names, flags, load, Path(work), progress)
    rows = dict(zip(names, found, strict=True))
    better = better_by(found[0], found[1]) if len(found) == 2 else None
    if as_json:
        ratios = {} if better is None else {"first_better_by": better}
        show.emit({**asdict(load), "models": [{"model": name, **values} for name, values in rows.items()], **ratios})
    else:
        print_speeds(rows, better)


def _report_gpu(folder: Path) -> int:
    """Run the suite, say where its archive goes, and return its exit status.

    Raises:
        UsageError: this is no clone, there is no GPU, or the folder is taken.
    """
    script = find_script()
    check_card()
    check_output(folder)
    status = run_suite(script, folder)
    archive = archive_of(folder)
    if archive.exists():
        say(f"Attach {archive} to an issue of the repository (form: GPU results); it names no user, machine or path.")
    return status


def _checked(names: Sequence[str], flags: Sequence[str], load: Load) -> list[Served]:
    """Return the models to serve, after all that can be known to be wrong before the first server starts.

    Raises:
        MoeqError: a model that is not there or damaged, a flag that vLLM cannot have, too little memory, texts that
            are too long.
    """
    if len(set(names)) < len(names):
        raise UsageError(f"DIR2: expected another model than DIR, found {names[0]} twice")
    for flag in OWN:
        if value_of(flags, flag) is not None:
            raise UsageError(f"{flag}: moeq bench starts its own server and asks it; expected it left out")
    checked = []
    for name in names:
        folder = find_checkpoint(name, flags)
        with SourceModel(folder) as model:
            packed, longest = is_moeq(model.config), longest_text(model)
        if packed:
            check_flags(flags)
        elif value_of(flags, "--quantization", "-q") == QUANT_METHOD:
            raise UsageError(f"--quantization: {name} is no checkpoint of {QUANT_METHOD}; expected it left out")
        check_folder(folder)
        check_tokenizer(folder, flags)
        allowed = value_of(flags, "--max-model-len") or ""
        check_lengths(load, int(allowed) if allowed.isdecimal() else longest, name)
        checked.append(Served(name, folder, [*cache_flags(folder, flags), *flags]))
    return checked


def bench_folder(served: Served, load: Load, work: Path, progress: Progress) -> dict[str, float]:
    """Start a server, measure it, end it.

    Raises:
        ServerError: the server did not start, or a request failed.
    """
    log = work / "server.log"
    progress.line(f"{served.name}: starting vLLM, log in {log}")
    with Server(served.folder, log, served.flags, quiet_environment(), START_SECONDS) as server:
        endpoint = Endpoint(server.url.removesuffix("/v1"), NAME)
        return _measured(served.name, endpoint, served.tokenizer, load, work, progress)


def _bench_url(
    url: str, names: Sequence[str], flags: Sequence[str], load: Load, work: Path, progress: Progress
) -> tuple[list[str], list[dict[str, float]]]:
    """Measure a running server; return the name of the model that it has, and the values.

    Raises:
        MoeqError: it does not answer, or there is more on the command line than it needs.
    """
    if flags:
        raise UsageError(f"--url: expected no flags for vLLM, whose server runs already, found {' '.join(flags)}")
    if len(names) > 1:
        raise UsageError(f"--url: expected one model, whose server it is, found {len(names)}")
    folder = find_checkpoint(names[0], [])
    check_tokenizer(folder, [])
    endpoint = find_endpoint(url)
    if endpoint.longest is not None:
        check_lengths(load, endpoint.longest, endpoint.model)
    return [endpoint.model], [_measured(endpoint.model, endpoint, str(folder), load, work, progress)]


def _measured(
    name: str, endpoint: Endpoint, tokenizer: str, load: Load, work: Path, progress: Progress
) -> dict[str, float]:
    progress.line(f"{name}: {load.requests} requests, {load.concurrency} at a time, to {endpoint.url}")
    folder = Path(tempfile.mkdtemp(dir=work))
    return measure(endpoint, tokenizer, load, folder)


def print_speeds(rows: dict[str, dict[str, float]], better: dict[str, float] | None) -> None:
    """Print a row per model and, of two, how many times as good the first one is."""
    table = Table()
    table.add_column("model", overflow="fold")
    for metric in METRICS.values():
        table.add_column(metric.title, justify="right")
    for name, values in rows.items():
        add_row(table, name, *(f"{values[metric]:,.2f}" for metric in METRICS))
    if better is not None:
        add_row(table, "the first, times as good as the second", *(f"{value:.2f}×" for value in better.values()))
    Console(highlight=False).print(table)

"""``moeq compare``: which allocation is best for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer

from planner.api.comparing import compare
from planner.api.estimating import estimate
from planner.api.keywords.common import parts
from planner.api.keywords.comparison import CandidateKeywords, MeasureKeywords
from planner.api.keywords.text import ComparedTextKeywords
from planner.commands import show
from planner.commands.completion import some_of
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Bits, DryRun, Json, Limit, Model, keywords_of
from planner.commands.flags.quantizing import ComparedQuantizerFlags, ComparedStorageFlags
from planner.commands.flags.running import CompareRunFlags
from planner.commands.show_needs import report_needs
from planner.common.progress import Progress
from planner.common.shown import say
from planner.comparison.report import print_rows
from planner.planning.methods import METHODS
from planner.quantization.quantizers.table import SchemeChoice

NAMES, AVERAGES, SCHEMES = (
    ",".join(parts(value))
    for value in (CandidateKeywords.methods, CandidateKeywords.avg_bits, CandidateKeywords.scheme)
)
"""The methods, averages and schemes unless flags say otherwise, as flags have them."""


@dataclass(frozen=True)
class CandidateFlags:
    """The plans that are compared."""

    methods: Annotated[
        str,
        typer.Option("--methods", metavar="LIST", autocompletion=some_of(("all", *METHODS)), help="Methods, or all."),
    ] = NAMES
    avg_bits: Annotated[str, typer.Option("--avg-bits", metavar="LIST", help="Average bits, such as 2,2.5.")] = AVERAGES
    bits: Bits = None
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            metavar="LIST",
            autocompletion=some_of(get_args(SchemeChoice)),
            help=f"How experts are stored, some of {', '.join(get_args(SchemeChoice))}: every plan is made in each.",
        ),
    ] = SCHEMES


@dataclass(frozen=True)
class ComparedTextFlags(TextFlags):
    """The calibration text, of which each seed takes other sequences."""

    seq_len: Annotated[int, typer.Option("--seq-len", min=16, help="Tokens of a calibration sequence.")] = (
        ComparedTextKeywords.seq_len
    )
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Number of random orders and of choices of calibration sequences.")
    ] = ComparedTextKeywords.seeds


@dataclass(frozen=True)
class MeasureFlags:
    """The measurements of every candidate."""

    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of context of the evaluation.")] = (
        MeasureKeywords.window
    )
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Tokens of the held-out text to evaluate at most.")
    ] = None
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="LIST", help="lm-eval tasks, or YAML files.")] = None
    limit: Limit = None
    odp: Annotated[str | None, typer.Option("--odp", metavar="LIST", help="Thresholds of ODP to evaluate besides.")] = (
        None
    )


def compare_command(
    model: Model,
    held_out: Annotated[
        Path, typer.Option("--held-out", metavar="FILE", help="Text to evaluate on, a file as for --data.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table, CSV, JSON and plot.")
    ],
    *,
    candidates: CandidateFlags,
    codes: ComparedQuantizerFlags,
    text: ComparedTextFlags,
    measured: MeasureFlags,
    storage: ComparedStorageFlags,
    run: CompareRunFlags,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by several methods and measure what each costs in quality. Continues a killed run.

    Example: moeq compare MODEL --methods kl,pmq,router-norm-maxvar --data train.txt --held-out test.txt -o comparison
    """
    keywords = keywords_of(candidates, codes, text, measured, storage, run)
    if dry_run:
        needs = estimate(compare, model, held_out=held_out, output=output, progress=Progress(), **keywords)
        report_needs("comparing", needs, as_json)
        return
    made = compare(model, held_out=held_out, output=output, progress=Progress(), **keywords)
    if as_json:
        show.emit(made.as_dict())
    else:
        print_rows(made.rows)
        say(f"wrote {output}")

"""``moeq compare``: which allocation is best for a model."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from planner.calibration.reading.text import longest_text
from planner.commands import show
from planner.commands.completion import some_of
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Bits, DryRun, Json, Limit, Model
from planner.commands.flags.planning import read_average, read_choices
from planner.commands.flags.quantizing import ComparedQuantizerFlags, StorageFlags
from planner.commands.flags.running import CompareRunFlags
from planner.commands.show_needs import report_needs
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.common.shown import say
from planner.comparison.compare import compare
from planner.comparison.entries import possible
from planner.comparison.report import print_rows, write_report
from planner.comparison.request import Comparison, ComparisonRun
from planner.estimates.comparison import compare_needs
from planner.evaluation.lm_eval_tasks import check_tasks
from planner.evaluation.perplexity import read_texts, read_tokens
from planner.model.layout import Layout, read_layout
from planner.model.skeleton import open_model
from planner.model.source import SourceModel
from planner.output.unfinished import check_output
from planner.planning.methods import METHODS
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.table import QUANTIZERS
from planner.quantization.settings import QuantizeSettings, check_sizes
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class CandidateFlags:
    """The plans that are compared."""

    methods: Annotated[
        str,
        typer.Option("--methods", metavar="LIST", autocompletion=some_of(("all", *METHODS)), help="Methods, or all."),
    ] = "all"
    avg_bits: Annotated[str, typer.Option("--avg-bits", metavar="LIST", help="Average bits, such as 2,2.5.")] = "2,2.5"
    bits: Bits = None

    def names(self) -> tuple[str, ...]:
        """Return the methods of the list, each once, or all of them.

        Raises:
            UsageError: an unknown one.
        """
        if self.methods == "all":
            return tuple(METHODS)
        names = tuple(dict.fromkeys(self.methods.split(",")))
        for name in names:
            if name not in METHODS:
                raise UsageError(f"--methods: expected some of {', '.join(METHODS)}, or all, found {name!r}")
        return names

    def averages(self) -> tuple[Fraction, ...]:
        """Return the averages; raise UsageError for one that is no number or out of range."""
        return tuple(read_average(part) for part in self.avg_bits.split(","))

    def choices(self) -> tuple[int, ...] | None:
        """Return the widths to choose from, or None for each method's own; raise UsageError for impossible ones."""
        return None if self.bits is None else read_choices(self.bits)


@dataclass(frozen=True)
class ComparedTextFlags(TextFlags):
    """The calibration text, of which each seed takes other sequences."""

    seq_len: Annotated[int, typer.Option("--seq-len", min=16, help="Tokens of a calibration sequence.")] = (
        Comparison.length
    )
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Number of random orders and of choices of calibration sequences.")
    ] = Comparison.seeds


@dataclass(frozen=True)
class MeasureFlags:
    """The measurements of every candidate."""

    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of context of the evaluation.")] = (
        Comparison.window
    )
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Tokens of the held-out text to evaluate at most.")
    ] = None
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="LIST", help="lm-eval tasks, or YAML files.")] = None
    limit: Limit = None
    odp: Annotated[str | None, typer.Option("--odp", metavar="LIST", help="Thresholds of ODP to evaluate besides.")] = (
        None
    )

    def names(self) -> tuple[str, ...]:
        """Return the tasks' names or files.

        Raises:
            UsageError: one that lm-eval does not know.
        """
        if self.tasks is None:
            return ()
        names = tuple(dict.fromkeys(self.tasks.split(",")))
        check_tasks(names)
        return names

    def thresholds(self) -> tuple[float, ...]:
        """Return the thresholds of ODP; raise UsageError for one that is no number or out of range."""
        try:
            values = tuple(float(part) for part in self.odp.split(",")) if self.odp else ()
        except ValueError:
            values = (-1.0,)
        if not all(0 < value <= 1 for value in values):
            raise UsageError(f"--odp: expected numbers above 0 and up to 1, such as 0.3,0.5, found {self.odp!r}")
        return values


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
    storage: StorageFlags,
    run: CompareRunFlags,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by several methods and measure what each costs in quality. Continues a killed run.

    Example: moeq compare MODEL --methods kl,pmq,router-norm-maxvar --data train.txt --held-out test.txt -o comparison
    """
    progress, where, names = Progress(), run.first_device(), candidates.names()
    check_output(output)
    with open_model(model, dry_run) as source:
        layout = read_layout(source)
        show.refuse_incomplete(source, layout, progress)
        settings = _settings(source, layout, codes, storage)
        content = read_texts(held_out, source.folder)
        _check_text(source, names, settings, text, measured.window)
        wanted = _wanted(names, settings, candidates, text, measured)
        if dry_run:
            comparison = ComparisonRun(source, layout, wanted, output, where, progress, run.jobs)
            possible(comparison)
            tokens = len(read_tokens(source.folder, content, measured.max_tokens, "--held-out"))
            report_needs("comparing", compare_needs(comparison, tokens), as_json)
            return
        return_large_blocks()
        rows = compare(
            source, layout, wanted, content, output, where, progress, run.resume,
            lambda rows: write_report(output, rows, wanted, str(source.folder), progress), run.jobs,
        )  # fmt: skip
    if as_json:
        show.emit(rows)
    else:
        print_rows(rows)
        say(f"wrote {output}")


def _settings(
    source: SourceModel, layout: Layout, codes: ComparedQuantizerFlags, storage: StorageFlags
) -> QuantizeSettings:
    """Return the settings with which every candidate is quantized.

    Raises:
        MoeqError: impossible sizes of groups, or input dimensions that cannot be packed.
    """
    linear = storage.linear(source, layout)
    gptq = GptqSettings() if QUANTIZERS[codes.quantizer].calibrated else None
    settings = QuantizeSettings(
        codes.quantizer, codes.one_bit, storage.checked_group_size(), linear, gptq=gptq, min_tokens=codes.min_tokens
    )
    check_sizes(source, layout, settings)
    return settings


def _check_text(
    source: SourceModel, names: tuple[str, ...], settings: QuantizeSettings, text: ComparedTextFlags, window: int
) -> None:
    """Refuse a comparison without the text that it needs, and sequences that the model cannot read.

    Raises:
        UsageError: naming the flag.
    """
    needs = [name for name in names if METHODS[name].calibrated or METHODS[name].only_compared]
    if text.data is None and (needs or settings.calibrated):
        what = f"--quantizer {settings.quantizer}" if settings.calibrated else f"--methods {','.join(needs)}"
        raise UsageError(f"{what}: expected --data TEXT to calibrate on, found none")
    longest = longest_text(source)
    read = {"--window": window} if text.data is None else {"--seq-len": text.seq_len, "--window": window}
    for flag, value in read.items():
        if value > longest:
            raise UsageError(f"{flag}: expected at most {longest}, the model's longest text, found {value}")


def _wanted(
    names: tuple[str, ...],
    settings: QuantizeSettings,
    candidates: CandidateFlags,
    text: ComparedTextFlags,
    measured: MeasureFlags,
) -> Comparison:
    """Return the request for the comparison; raise UsageError for a list that cannot be read."""
    return Comparison(
        methods=names,
        averages=candidates.averages(),
        bit_choices=candidates.choices(),
        settings=settings,
        data=text.data,
        samples=text.samples,
        length=text.seq_len,
        seeds=text.seeds,
        window=measured.window,
        max_tokens=measured.max_tokens,
        tasks=measured.names(),
        limit=measured.limit,
        odp=measured.thresholds(),
    )

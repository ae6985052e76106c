"""``moeq compare``: which allocation is best for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from planner.calibration.reading.text import longest_text
from planner.commands import show
from planner.commands.calibration_flags import Data, MinTokens, Samples, expert_devices
from planner.commands.completion import some_of
from planner.commands.flags import (
    Bits,
    Device,
    GroupSize,
    Json,
    LinearBits,
    LinearGroup,
    Model,
    OneBit,
    QuantizerName,
    Resume,
    checked_average,
    checked_group_size,
    linear_format,
    read_choices,
)
from planner.commands.service_flags import DryRun
from planner.commands.show_needs import report_needs
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.comparison.compare import compare
from planner.comparison.report import print_rows, write_report
from planner.comparison.request import Comparison, ComparisonRun
from planner.estimates.comparison import compare_needs
from planner.evaluation.perplexity import read_text, read_tokens
from planner.model.layout import read_layout
from planner.model.skeleton import open_model
from planner.output.unfinished import check_output
from planner.planning.methods import METHODS
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.settings import QuantizeSettings, check_sizes
from vllm_moeq.format import UsageError


def compare_command(
    model: Model,
    held_out: Annotated[Path, typer.Option("--held-out", metavar="FILE", help="Text to evaluate on, UTF-8.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table, CSV, JSON and plot.")
    ],
    methods: Annotated[
        str,
        typer.Option("--methods", metavar="LIST", autocompletion=some_of(("all", *METHODS)), help="Methods, or all."),
    ] = "all",
    avg_bits: Annotated[str, typer.Option("--avg-bits", metavar="LIST", help="Average bits, such as 2,2.5.")] = "2,2.5",
    bits: Bits = None,
    quantizer: Annotated[QuantizerName, typer.Option("--quantizer", help="For two bits and more.")] = QuantizerName.hqq,
    one_bit: Annotated[OneBit, typer.Option("--one-bit", help="For one bit.")] = OneBit.sign,
    data: Data = None,
    samples: Samples = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", min=16, help="Tokens of a calibration sequence.")] = 512,
    min_tokens: MinTokens = 64,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Of random orders and of calibration sequences.")] = 1,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of context of the evaluation.")] = 512,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Of the held-out text.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="LIST", help="lm-eval tasks, or YAML files.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task.")] = None,
    odp: Annotated[
        str | None, typer.Option("--odp", metavar="LIST", help="ODP thresholds to evaluate besides.")
    ] = None,
    group_size: GroupSize = 128,
    linear_bits: LinearBits = 4,
    linear_group_size: LinearGroup = None,
    device: Device = "cpu",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Models quantized at a time, a process each.")] = 1,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by several methods and measure what each costs in quality. Continues a killed run.

    Example: moeq compare MODEL --methods kl,pmq,router-norm-maxvar --data train.txt --held-out test.txt -o comparison
    """
    progress, where = Progress(), expert_devices(device, None, False)[0]
    names = _methods(methods)
    text = read_text(held_out)
    check_output(output)
    with open_model(model, dry_run) as source:
        layout = read_layout(source)
        linear = linear_format(source, layout, linear_bits, linear_group_size)
        gptq = GptqSettings() if quantizer is QuantizerName.gptq else None
        settings = QuantizeSettings(
            quantizer.value, one_bit.value, checked_group_size(group_size), linear, gptq=gptq, min_tokens=min_tokens
        )
        check_sizes(source, layout, settings)
        needs = [name for name in names if METHODS[name].calibrated or METHODS[name].only_compared]
        if data is None and (needs or gptq):
            what = "--quantizer gptq" if gptq else f"--methods {','.join(needs)}"
            raise UsageError(f"{what}: expected --data TEXT to calibrate on, found none")
        longest = longest_text(source)
        for flag, value in (("--seq-len", seq_len), ("--window", window)):
            if value > longest:
                raise UsageError(f"{flag}: expected at most {longest}, the model's longest text, found {value}")
        wanted = Comparison(
            methods=names,
            averages=tuple(checked_average(part) for part in avg_bits.split(",")),
            bit_choices=None if bits is None else read_choices(bits),
            settings=settings,
            data=data,
            samples=samples,
            length=seq_len,
            seeds=seeds,
            window=window,
            max_tokens=max_tokens,
            tasks=tuple(tasks.split(",")) if tasks else (),
            limit=limit,
            odp=_thresholds(odp),
        )
        if dry_run:
            run = ComparisonRun(source, layout, wanted, output, where, progress, jobs)
            tokens = len(read_tokens(source.folder, text, max_tokens, "--held-out"))
            report_needs("comparing", compare_needs(run, tokens), as_json)
            return
        return_large_blocks()
        rows = compare(
            source, layout, wanted, text, output, where, progress, resume,
            lambda rows: write_report(output, rows, wanted, str(source.folder)), jobs,
        )  # fmt: skip
    if as_json:
        show.emit(rows)
    else:
        print_rows(rows)
        Console().print(f"wrote {output}", soft_wrap=True)


def _methods(text: str) -> tuple[str, ...]:
    """Return the methods of a list, or all of them.

    Raises:
        UsageError: an unknown one.
    """
    if text == "all":
        return tuple(METHODS)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods: expected some of {', '.join(METHODS)}, or all, found {name!r}")
    return names


def _thresholds(text: str | None) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        values = (-1.0,)
    if not all(0 < value <= 1 for value in values):
        raise UsageError(f"--odp: expected numbers above 0 and up to 1, such as 0.3,0.5, found {text!r}")
    return values

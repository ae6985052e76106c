"""``moeq calibrate``: statistics of every expert over a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from planner.api import notes
from planner.api.keywords.running import first_device
from planner.api.keywords.text import TextKeywords
from planner.api.keywords.widths import read_choices
from planner.api.results import Estimate
from planner.calibration.collect import StatisticsRequest, collect
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import calibration_facts
from planner.calibration.statistics import LayerStatistics, json_path
from planner.commands import show
from planner.commands.completion import some_of
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Bits, DryRun, Json, Model, Seed
from planner.commands.flags.running import RunFlags
from planner.commands.show_needs import report_needs
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.common.shown import add_row, say
from planner.estimates import Reading
from planner.estimates.parts import statistics_parts
from planner.estimates.quantizing import calibrate_needs
from planner.model.layout import read_layout
from planner.model.skeleton import open_model
from planner.output.paths import check_output
from planner.planning.methods import METHODS, OURS
from vllm_moeq.format import UsageError


def calibrate_command(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Statistics to write, a new .safetensors.")
    ],
    *,
    text: TextFlags,
    methods: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="LIST",
            autocompletion=some_of(name for name, method in METHODS.items() if method.calibrated),
            help="Methods that will use the statistics, such as kl or pmq,gemq.",
        ),
    ] = OURS,
    bits: Bits = None,
    seed: Seed = 0,
    run: RunFlags,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a model over a text and write what each expert saw. Continues a killed run.

    Example: moeq calibrate mistralai/Mixtral-8x7B-v0.1 --data wikitext2 -o stats.safetensors
    """
    measures = _measures(methods)
    own = sorted({width for name in methods.split(",") for width in METHODS[name].choices})
    wanted = StatisticsRequest(measures, tuple(own) if bits is None else read_choices(bits), seed)
    where, progress = first_device(run.device), Progress()
    if json_path(output) == output:
        raise UsageError(f"-o: {output}: expected a .safetensors file, found the name of its description")
    check_output(output)
    check_output(json_path(output))
    with open_model(model, dry_run) as source:
        layout = read_layout(source)
        notes.refuse_incomplete(source, layout, progress)
        sequences = TextKeywords(**vars(text)).read_text(source, seed, progress)
        facts, reading = calibration_facts(sequences, where), Reading(*sequences.tokens.shape)
        if dry_run:
            needs = calibrate_needs(source, layout, reading, measures, where)
            report_needs("calibrating", Estimate(needs), as_json)
            return
        return_large_blocks()
        dtype = compute_dtype(where)
        with progress.whole():
            progress.expect(statistics_parts(source.config, layout, reading, measures, where))
            found = collect(source, layout, sequences, output, facts, where, dtype, progress, run.resume, wanted)
    if as_json:
        coverage = {prefix: layer.tokens.tolist() for prefix, layer in found.items()}
        show.emit({"output": str(output), "calibration": facts, "tokens": coverage})
    else:
        print_coverage(found)
        say(f"wrote {output} and {json_path(output)}")


def _measures(methods: str) -> tuple[str, ...]:
    """Return the measures that the methods of a list such as kl,pmq need.

    Raises:
        UsageError: a method that does not exist or needs no text.
    """
    known = [name for name, method in METHODS.items() if method.calibrated]
    names = methods.split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"--for: expected methods that use a text ({', '.join(known)}), found {name!r}")
    return tuple(dict.fromkeys(measure for name in names for measure in METHODS[name].measures))


def print_coverage(found: Mapping[str, LayerStatistics]) -> None:
    """Print the number of calibration tokens that reach the experts of each layer."""
    table = Table("MoE layer", "experts", "least", "median", "most", "without", title="calibration tokens per expert")
    for prefix, layer in found.items():
        tokens = layer.tokens
        numbers = (tokens.min(), tokens.median(), tokens.max())
        texts = (f"{int(number):,}" for number in numbers)
        add_row(table, prefix, str(tokens.numel()), *texts, str(int((tokens == 0).sum())))
    Console().print(table)

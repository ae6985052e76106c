"""``moeq calibrate``: statistics of every expert over a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from planner.api.calibrating import calibrate
from planner.api.estimating import estimate
from planner.calibration.statistics import json_path
from planner.commands import show
from planner.commands.completion import some_of
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Bits, DryRun, Json, Model, Seed, keywords_of
from planner.commands.flags.quantizing import Scheme
from planner.commands.flags.running import RunFlags
from planner.commands.show_needs import report_needs
from planner.common.progress import Progress
from planner.common.shown import add_row, say
from planner.planning.methods import METHODS, OURS


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
    scheme: Scheme = None,
    run: RunFlags,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a model over a text and write what each expert saw. Continues a killed run.

    Example: moeq calibrate mistralai/Mixtral-8x7B-v0.1 --data wikitext2 -o stats.safetensors
    """
    keywords = {**keywords_of(text, run), "methods": methods, "bits": bits, "seed": seed, "scheme": scheme}
    if dry_run:
        needs = estimate(calibrate, model, output=output, progress=Progress(), **keywords)
        report_needs("calibrating", needs, as_json)
        return
    made = calibrate(model, output=output, progress=Progress(), **keywords)
    if as_json:
        show.emit(made.as_dict())
    else:
        print_coverage(made.tokens)
        say(f"wrote {output} and {json_path(output)}")


def print_coverage(found: Mapping[str, Sequence[int]]) -> None:
    """Print the number of calibration tokens that reach the experts of each layer."""
    table = Table("MoE layer", "experts", "least", "median", "most", "without", title="calibration tokens per expert")
    for prefix, counts in found.items():
        tokens = torch.tensor(counts)
        numbers = (tokens.min(), tokens.median(), tokens.max())
        texts = (f"{int(number):,}" for number in numbers)
        add_row(table, prefix, str(tokens.numel()), *texts, str(int((tokens == 0).sum())))
    Console().print(table)

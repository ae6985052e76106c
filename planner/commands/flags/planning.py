"""The flags that say how widths are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from planner.allocation.levels import Counts
from planner.allocation.order import Promotion
from planner.api.keywords.widths import AVERAGE, WidthKeywords
from planner.commands.completion import one_of
from planner.commands.flags.common import Bits, Seed
from planner.commands.flatten import OneOf
from planner.estimates.presets import PRESETS
from planner.planning.method import Scope
from planner.planning.methods import METHODS, OURS, PAPER


@dataclass(frozen=True)
class PlanFlags:
    """The choice of widths."""

    avg_bits: Annotated[
        str | None, typer.Option("--avg-bits", metavar="B", help=f"Average bits per expert weight [{AVERAGE}].")
    ] = None
    budget_gib: Annotated[
        float | None,
        typer.Option("--budget-gib", metavar="GIB", help="Instead of --avg-bits: GiB that all weights may take."),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help=f"Flags for a number of bits, or for what one GPU holds beside the cache: {', '.join(PRESETS)}.",
        ),
        OneOf(PRESETS),
    ] = None
    bits: Bits = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            autocompletion=one_of(("auto", *METHODS)),
            help=f"Rule for the choice: auto ({OURS} with a text or statistics, else the paper's {PAPER}), "
            f"{', '.join(METHODS)}.",
        ),
    ] = WidthKeywords.method
    zeta: Annotated[
        float, typer.Option("--zeta", help="Promote an expert whose MaxVar is more than this times another's (ζ).")
    ] = WidthKeywords.zeta
    promotion: Annotated[Promotion, typer.Option("--promotion", help="Order among several promoted experts.")] = (
        WidthKeywords.promotion
    )
    counts: Annotated[Counts, typer.Option("--counts", help="Experts per width: the paper's rule or its code's.")] = (
        WidthKeywords.counts
    )
    ranking: Annotated[
        Scope | None,
        typer.Option("--ranking", help="Experts compete within each layer, or all together [the method's]."),
    ] = None
    initial_model: Annotated[
        Path | None,
        typer.Option("--initial-model", metavar="DIR", help="Model before training: rank by the change of norm."),
    ] = None
    stats: Annotated[
        Path | None,
        typer.Option("--stats", metavar="FILE", help="Statistics that moeq calibrate wrote, instead of a text."),
    ] = None
    overrides: Annotated[
        Path | None,
        typer.Option("--overrides", metavar="FILE", help='JSON of fixed widths: {"<experts prefix>.3": 3}.'),
    ] = None
    seed: Seed = WidthKeywords.seed

"""``moeq plan``: a width for every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.api.estimating import estimate
from planner.api.planning import plan
from planner.commands import show
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Json, Model, keywords_of
from planner.commands.flags.planning import PlanFlags
from planner.commands.flags.quantizing import NAMES, Scheme, StorageFlags
from planner.commands.flags.running import RunFlags
from planner.commands.flags.service import ServiceFlags
from planner.commands.show_needs import report_needs
from planner.common.progress import Progress
from planner.quantization.quantizers.table import DEFAULT, DEFAULT_WITH_TEXT, quantizer_names


def plan_command(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="File for the plan; an older one is replaced.")
    ] = None,
    *,
    planning: PlanFlags,
    quantizer: Annotated[
        str | None,
        typer.Option(
            "--quantizer",
            metavar="NAME",
            help="Quantizer that will find the codes, because some choices depend on it: "
            f"{', '.join(quantizer_names())} [{DEFAULT_WITH_TEXT} with --data or --stats, else {DEFAULT}].",
        ),
        NAMES,
    ] = None,
    scheme: Scheme = None,
    text: TextFlags,
    run: RunFlags,
    storage: StorageFlags,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes from the headers, or from config.json alone; plan nothing.")
    ] = False,
    service: ServiceFlags,
    as_json: Json = False,
) -> None:
    """Choose a width for every expert and write plan.json. With -o, continues a killed run.

    Example: moeq plan mistralai/Mixtral-8x7B-v0.1 --avg-bits 2.5 --data wikitext2 -o plan.json
    """
    keywords = {**keywords_of(planning, text, run, storage, service), "quantizer": quantizer, "scheme": scheme}
    if dry_run:
        needs = estimate(plan, model, output=output, progress=Progress(), **keywords)
        report_needs("planning", needs, as_json)
        return
    made = plan(model, output=output, progress=Progress(), **keywords)
    if as_json:
        show.emit(made.as_dict())
    else:
        show.print_plan(made)

"""``moeq report``: the page, the pictures, and the card brought up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.api.reporting import report
from planner.commands import show
from planner.commands.flags.common import Folder, Json
from planner.common.progress import Progress
from planner.common.shown import say
from planner.reporting.files import PAGE


def report_command(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help=f"The page [DIR/{PAGE}]; an older one is replaced."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="SOURCE", help="The source model, to compute MaxVar if need be.")
    ] = None,
    png: Annotated[
        bool | None, typer.Option("--png/--no-png", help="Pictures too [where matplotlib is installed].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint on one self-contained HTML page, and bring its README.md up to date.

    Example: moeq report Mixtral-8x7B-2.5bit
    """
    made = report(folder, output=output, model=model, png=png, progress=Progress())
    if as_json:
        show.emit(made.as_dict())
    else:
        say(f"report: {made.report}")

"""Single flags and arguments, for commands and for groups of flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from planner.planning.method import Method
from planner.planning.methods import METHODS, OURS
from vllm_moeq.format import BIT_WIDTHS


def listed(widths: tuple[int, ...], separator: str = ",") -> str:
    """Return widths as help texts and flags have them."""
    return separator.join(map(str, widths))


def keywords_of(*groups: object) -> dict[str, Any]:
    """Return the flags of some groups as keyword arguments of the command's function."""
    return {name: value for group in groups for name, value in vars(group).items()}


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub name (owner/name).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint written by moeq quantize.")]
NewFolder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to create.")]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="LIST",
        help=f"Widths to choose from, out of {listed(BIT_WIDTHS, ', ')} "
        f"[{listed(Method().choices)}; for {OURS} {listed(METHODS[OURS].choices)}].",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random orders and of the choice of calibration sequences.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task.")]
Device = Annotated[
    str, typer.Option("--device", metavar="LIST", help="Devices to compute on: cpu, cuda or cuda:0,cuda:1.")
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Continue an unfinished run, or delete it and start anew.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what it would write and take, from the headers; do nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

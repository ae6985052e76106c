"""``moeq report``: the page, the pictures, and the card brought up to date."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.commands import show
from planner.commands.flags.common import Folder, Json
from planner.common.install import install_line, missing
from planner.common.progress import Progress
from planner.common.shown import say
from planner.model.hub import resolve_model
from planner.model.source import SourceModel
from planner.output.files import atomic
from planner.report.card import refresh_card
from planner.report.facts import Facts, collect
from planner.report.files import CARD, PAGE
from planner.report.page import render
from planner.report.png import draw
from planner.report.value_maps import ValueMaps, collect_maps
from vllm_moeq.format import UsageError


def report_command(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help=f"The page [DIR/{PAGE}]."),
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
    progress = Progress()
    drawable = not missing(("matplotlib",))
    facts = collect(folder)
    page = output or folder / PAGE
    if not page.absolute().parent.is_dir():
        raise UsageError(f"{page}: expected the folder {page.absolute().parent} to exist")
    if page.is_dir():
        raise UsageError(f"{page}: expected a file to write, found a folder")
    grids = _grids(facts, model)
    with atomic(page) as temporary:
        temporary.write_text(render(facts, grids), encoding="utf-8")
    pictures = draw(facts, grids, page) if drawable and png is not False else []
    if not drawable and png is None:
        progress.line(f"no pictures: they need matplotlib, {install_line('report')}")
    _refresh(folder, progress)
    if as_json:
        show.emit(_as_json(facts, grids, page, pictures))
    else:
        say(f"report: {page}")


def _grids(facts: Facts, model: str | None) -> ValueMaps:
    if model is None:
        return collect_maps(facts)
    with SourceModel(resolve_model(model)) as source:
        return collect_maps(facts, source)


def _refresh(folder: Path, progress: Progress) -> None:
    if not os.access(folder, os.W_OK):
        progress.line(f"note: {folder / CARD} is as it was: the folder cannot be written")
    elif not refresh_card(folder):
        progress.line(f"note: {folder / CARD} is as it was: it has no evaluation section of ours")


def _as_json(facts: Facts, grids: ValueMaps, page: Path, pictures: list[Path]) -> dict[str, Any]:
    """Return the page's content as JSON values."""
    sizes = facts.sizes
    return {
        "report": str(page),
        "pictures": [str(path) for path in pictures],
        "source": facts.name,
        "average_bits": facts.average_bits,
        "widths": facts.widths,
        "promoted": facts.num_promoted,
        "fallbacks": facts.num_fallbacks,
        "bytes": {part.title: part.bytes for part in sizes.parts},
        "total_bytes": sizes.total,
        "half_precision_bytes": sizes.half_precision,
        "source_bytes": sizes.source,
        "grids": {grid.key: grid.values for grid in grids.known},
        "missing": grids.missing,
        "evaluation": facts.evaluations.model_dump(mode="json", exclude_none=True),
    }

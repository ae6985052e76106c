"""``planner.report``: the page, the pictures, and the card brought up to date."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from planner.api.call import takes
from planner.api.keywords.common import PathName, ProgressKeyword
from planner.api.results import Reported
from planner.common.install import install_line, missing
from planner.common.progress import Progress
from planner.model.hub import resolve_model
from planner.model.source import SourceModel
from planner.output.files import atomic
from planner.output.paths import check_file
from planner.reporting.card import refresh_card
from planner.reporting.facts import Facts, collect
from planner.reporting.files import CARD, PAGE, PICTURES, picture
from planner.reporting.page import render
from planner.reporting.png import draw
from planner.reporting.value_maps import ValueMaps, collect_maps


@dataclass(frozen=True)
class ReportKeywords(ProgressKeyword):
    """The arguments of :func:`report`.

    Attributes:
        folder: a checkpoint that :func:`planner.quantize` wrote.
        output: the page; None is report.html in the folder.
        model: the source model, to compute MaxVar if need be.
        png: pictures too; None is where matplotlib is installed.
    """

    folder: PathName
    _: KW_ONLY
    output: PathName | None = None
    model: PathName | None = None
    png: bool | None = None


@takes(ReportKeywords, "report")
def report(wanted: ReportKeywords) -> Reported:
    """Show a checkpoint on one page, and bring its README.md up to date, as ``moeq report`` does.

    Raises:
        MoeqError: a damaged checkpoint, a page that cannot be written, no matplotlib; its message is one line.
    """
    progress, folder, drawable = wanted.display(), Path(wanted.folder), not missing(("matplotlib",))
    facts = collect(folder)
    page = folder / PAGE if wanted.output is None else Path(wanted.output)
    pictured = drawable and wanted.png is not False
    for path in (page, *(picture(page, name) for name in PICTURES if pictured)):
        check_file(path, links=wanted.output is None)
    grids = _grids(facts, wanted.model)
    text = render(facts, grids)
    with atomic(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    pictures = draw(facts, grids, page) if pictured else []
    if not drawable and wanted.png is None:
        progress.line(f"no pictures: they need matplotlib, {install_line('report')}")
    _refresh(folder, progress)
    return Reported(page, pictures, facts, grids)


def _grids(facts: Facts, model: PathName | None) -> ValueMaps:
    if model is None:
        return collect_maps(facts)
    with SourceModel(resolve_model(str(model))) as source:
        return collect_maps(facts, source)


def _refresh(folder: Path, progress: Progress) -> None:
    if not os.access(folder, os.W_OK):
        progress.line(f"note: {folder / CARD} is as it was: the folder cannot be written")
    elif not refresh_card(folder):
        progress.line(f"note: {folder / CARD} is as it was: it has no evaluation section of ours")

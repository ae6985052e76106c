"""``moeq plan``: a width for every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.commands import show
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Json, Model
from planner.commands.flags.planning import PlanFlags
from planner.commands.flags.presets import with_preset
from planner.commands.flags.quantizing import NAMES, StorageFlags
from planner.commands.flags.running import RunFlags
from planner.commands.flags.service import ServiceFlags
from planner.commands.show_needs import report_plan_needs
from planner.common.progress import Progress
from planner.estimates import Reading
from planner.estimates.parts import planning_parts
from planner.estimates.quantizing import plan_needs
from planner.model.layout import read_layout
from planner.model.sizes import estimate
from planner.model.skeleton import open_model
from planner.planning.make import make_plan
from planner.planning.request import check_options
from planner.planning.statistics import discard_statistics, with_statistics
from planner.quantization.quantizers.table import DEFAULT, DEFAULT_WITH_TEXT, default_quantizer
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import UsageError


def plan_command(
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="File for the plan.")] = None,
    *,
    planning: PlanFlags,
    quantizer: Annotated[
        str | None,
        typer.Option(
            "--quantizer",
            help="Quantizer that will find the codes: some choices depend on it "
            f"[{DEFAULT_WITH_TEXT} with --data, else {DEFAULT}].",
        ),
        NAMES,
    ] = None,
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
    progress, where, given = Progress(), run.first_device(), text.data is not None
    if dry_run and output is not None:
        raise UsageError("-o and --dry-run: expected one of them, found both")
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"{output}: expected the folder {output.absolute().parent} to exist")
    with open_model(model, dry_run) as source:
        layout = read_layout(source)
        show.refuse_incomplete(source, layout, progress)
        show.note_limits(source, layout, progress)
        linear, group_size = storage.linear(source, layout), storage.checked_group_size()
        settings = QuantizeSettings(quantizer or default_quantizer(given), group_size=group_size, linear=linear)
        planning, load = with_preset(planning, service, source, layout, settings, text=given, progress=progress)
        options = planning.options(source, layout, settings, text=given, ranked=not dry_run)
        check_options(options)
        found = text.read(source, planning.seed) if given else None
        show.announce(options, progress)
        if dry_run:
            made = make_plan(source, layout, options, progress)
            needs = plan_needs(source, layout, options, Reading.of(found), where)
            report_plan_needs(source, layout, made, settings, needs, load, as_json)
            return
        with progress.whole():
            progress.expect(planning_parts(source, layout, options, Reading.of(found), where))
            with with_statistics(source, layout, options, found, where, output, progress, run.resume) as known:
                made = make_plan(source, layout, known, progress)
        sizes = estimate(source, layout, made.experts, settings.group_size, settings.linear, settings.scheme)
    if output is not None:
        made.write(output)
        discard_statistics(output)
    if as_json:
        show.emit({**made.model_dump(mode="json"), "sizes": sizes.as_dict()})
    else:
        show.print_plan(made, sizes)

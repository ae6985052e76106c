"""``moeq quantize``: plan, quantize, write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.api.estimating import estimate
from planner.api.quantizing import quantize
from planner.commands import show
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Json, Model, NewFolder, keywords_of
from planner.commands.flags.planning import PlanFlags
from planner.commands.flags.quantizing import GptqFlags, StorageFlags, WrittenQuantizerFlags
from planner.commands.flags.running import QuantizeRunFlags
from planner.commands.flags.service import ServiceFlags
from planner.commands.show_needs import report_needs
from planner.common.progress import Progress
from planner.common.shown import say


def quantize_command(
    model: Model,
    output: NewFolder,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Use this plan.json instead of making one.")
    ] = None,
    *,
    planning: PlanFlags,
    codes: WrittenQuantizerFlags,
    storage: StorageFlags,
    text: TextFlags,
    gptq: GptqFlags,
    run: QuantizeRunFlags,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, print sizes and memory from the headers, write nothing.")
    ] = False,
    service: ServiceFlags,
    as_json: Json = False,
) -> None:
    """Plan, quantize and write a checkpoint that vLLM serves. Continues a killed run.

    Example: moeq quantize mistralai/Mixtral-8x7B-v0.1 --avg-bits 2.5 --data wikitext2 -o Mixtral-8x7B-2.5bit
    """
    keywords = keywords_of(planning, codes, storage, text, gptq, run, service)
    if dry_run:
        needs = estimate(quantize, model, output=output, plan=plan, progress=Progress(), **keywords)
        report_needs("quantizing", needs, as_json)
        return
    made = quantize(model, output=output, plan=plan, progress=Progress(), **keywords)
    if as_json:
        show.emit(made.as_dict())
        return
    show.print_widths(made.plan.experts)
    show.print_linears(made.plan.linears)
    show.print_sizes(made.sizes)
    say(f"wrote {output}{f'; serve it with: {made.serve}' if made.serve else ''}")

"""``moeq plan``: a width for every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.commands import show
from planner.commands.calibration_flags import Data, Samples, SeqLen, expert_devices, read_calibration
from planner.commands.flags import (
    AvgBits,
    Bits,
    Budget,
    Counts,
    CountsFlag,
    Device,
    ForQuantizer,
    GroupSize,
    Initial,
    Json,
    LinearBits,
    LinearGroup,
    MethodName,
    Model,
    Overrides,
    Promotion,
    PromotionFlag,
    RankingFlag,
    Seed,
    Stats,
    Zeta,
    checked_group_size,
    linear_format,
    plan_options,
    planned_quantizer,
)
from planner.commands.quantize import uses_text
from planner.commands.service_flags import Concurrency, Context, GpuGib
from planner.commands.show_needs import report_plan_needs
from planner.common.progress import Progress
from planner.estimates import Reading, Service
from planner.estimates.quantizing import plan_needs
from planner.model.layout import read_layout
from planner.model.sizes import estimate
from planner.model.skeleton import open_model
from planner.planning.make import make_plan
from planner.planning.statistics import with_statistics
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import UsageError


def plan_command(
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where plan.json goes.")] = None,
    avg_bits: AvgBits = None,
    bits: Bits = None,
    method: MethodName = "auto",
    zeta: Zeta = 3.0,
    promotion: PromotionFlag = Promotion.official,
    counts: CountsFlag = Counts.paper,
    ranking: RankingFlag = None,
    initial_model: Initial = None,
    stats: Stats = None,
    quantizer: ForQuantizer = None,
    data: Data = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    device: Device = "cpu",
    budget_gib: Budget = None,
    overrides: Overrides = None,
    seed: Seed = 0,
    group_size: GroupSize = 128,
    linear_bits: LinearBits = 4,
    linear_group_size: LinearGroup = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes from the headers, or from config.json alone; plan nothing.")
    ] = False,
    context: Context = 8192,
    concurrency: Concurrency = 16,
    gpu_gib: GpuGib = 80.0,
    as_json: Json = False,
) -> None:
    """Choose a width for every expert and write plan.json.

    Example: moeq plan mistralai/Mixtral-8x7B-v0.1 --avg-bits 2.5 --bits 1,2,3 -o plan.json
    """
    progress, where = Progress(), expert_devices(device, None, False)[0]
    if dry_run and output is not None:
        raise UsageError("-o and --dry-run: expected one of them, found both")
    with open_model(model, dry_run) as source:
        layout = read_layout(source)
        show.note_limits(source, layout, progress)
        linear = linear_format(source, layout, linear_bits, linear_group_size)
        settings = QuantizeSettings(group_size=checked_group_size(group_size), linear=linear)
        options = plan_options(
            source, layout, settings, avg_bits=avg_bits, bits=bits, budget_gib=budget_gib, overrides=overrides,
            initial_model=initial_model, stats=stats, method=method, zeta=zeta, promotion=promotion.value,
            counts=counts.value, ranking=ranking and ranking.value, seed=seed, ranked=not dry_run,
            calibrated=data is not None, quantizer=planned_quantizer(quantizer, data is not None),
        )  # fmt: skip
        show.announce(options, progress)
        if data is not None and stats is not None:
            raise UsageError("--data and --stats: expected one of them, found both")
        if data is not None and not uses_text(method, None):
            raise UsageError(f"--data: the method {method} does not read a text")
        text = None if data is None else read_calibration(source, data, samples, seq_len, seed)
        with with_statistics(source, layout, options, text, where, None, progress) as known:
            made = make_plan(source, layout, known, progress)
        if dry_run:
            needs = plan_needs(source, layout, options, Reading.of(text), where)
            report_plan_needs(source, layout, made, settings, needs, Service(context, concurrency, gpu_gib), as_json)
            return
        sizes = estimate(source, layout, made.experts, settings.group_size, settings.linear)
    if output is not None:
        made.write(output)
    if as_json:
        show.emit({**made.model_dump(mode="json"), "sizes": sizes.as_dict()})
    else:
        show.print_plan(made, sizes)

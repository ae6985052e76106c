"""``moeq quantize``: plan, quantize, write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from planner.calibration.gptq.runner import GptqRunner
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import calibration_facts
from planner.commands import show
from planner.commands.calibration_flags import (
    ActOrder,
    ActOrderFlag,
    Compat,
    Damping,
    Data,
    MinTokens,
    Samples,
    Search,
    SearchFlag,
    SeqLen,
    StaticGroups,
    Symmetric,
    expert_devices,
    gptq_settings,
    read_calibration,
)
from planner.commands.flags import (
    AvgBits,
    Bits,
    Budget,
    Counts,
    CountsFlag,
    Device,
    GroupSize,
    Initial,
    Jobs,
    Json,
    LinearBits,
    LinearGroup,
    MethodName,
    Model,
    OneBit,
    OnRay,
    Overrides,
    Promotion,
    PromotionFlag,
    QuantizerName,
    RankingFlag,
    Resume,
    Seed,
    Stats,
    ZeroPointsName,
    Zeta,
    checked_group_size,
    linear_format,
    plan_options,
)
from planner.commands.service_flags import Concurrency, Context, GpuGib
from planner.commands.show_needs import report_quantize_needs
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.estimates import Reading, Service, serving_needs
from planner.estimates.quantizing import quantize_needs
from planner.model.layout import architecture_of, read_layout
from planner.model.sizes import estimate
from planner.model.skeleton import open_model
from planner.output.unfinished import check_output
from planner.plan import Plan, read_plan
from planner.planning.make import make_plan
from planner.planning.methods import METHODS
from planner.planning.statistics import with_statistics
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.run import quantize
from planner.quantization.runners import Runner, choose_runner
from planner.quantization.settings import QuantizeSettings, check_sizes
from planner.report.card import write_card
from vllm_moeq.format import UsageError


def quantize_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to create.")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Use this plan.json instead of making one.")
    ] = None,
    avg_bits: AvgBits = None,
    bits: Bits = None,
    method: MethodName = "auto",
    zeta: Zeta = 3.0,
    promotion: PromotionFlag = Promotion.official,
    counts: CountsFlag = Counts.paper,
    ranking: RankingFlag = None,
    initial_model: Initial = None,
    stats: Stats = None,
    budget_gib: Budget = None,
    overrides: Overrides = None,
    seed: Seed = 0,
    quantizer: Annotated[
        QuantizerName | None, typer.Option("--quantizer", help="For two bits and more [gptq with --data, else hqq].")
    ] = None,
    one_bit: Annotated[OneBit, typer.Option("--one-bit", help="For one bit.")] = OneBit.sign,
    zero_points: Annotated[
        ZeroPointsName, typer.Option("--zero-points", help="Of experts; other formats need integer ones.")
    ] = ZeroPointsName.float,
    group_size: GroupSize = 128,
    linear_bits: LinearBits = 4,
    linear_group_size: LinearGroup = None,
    data: Data = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    min_tokens: MinTokens = 64,
    damping: Damping = 0.01,
    act_order: ActOrderFlag = ActOrder.group,
    static_groups: StaticGroups = False,
    symmetric: Symmetric = False,
    scale_search: SearchFlag = Search.mse,
    compat: Compat = False,
    jobs: Jobs = None,
    device: Device = "cpu",
    ray: OnRay = False,
    resume: Resume = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, print sizes and memory from the headers, write nothing.")
    ] = False,
    context: Context = 8192,
    concurrency: Concurrency = 16,
    gpu_gib: GpuGib = 80.0,
    as_json: Json = False,
) -> None:
    """Plan, quantize and write a checkpoint that vLLM serves. Continues a killed run.

    Example: moeq quantize mistralai/Mixtral-8x7B-v0.1 --avg-bits 2.5 -o Mixtral-8x7B-2.5bit
    """
    progress = Progress()
    if quantizer is None:
        quantizer = QuantizerName.hqq if data is None else QuantizerName.gptq
    calibrated = quantizer is QuantizerName.gptq
    gptq = gptq_settings(
        damping=damping, act_order=act_order.value, static_groups=static_groups, symmetric=symmetric,
        search=scale_search.value, compat=compat,
    )  # fmt: skip
    if not calibrated and gptq != GptqSettings():
        raise UsageError(f"the flags of GPTQ: expected --quantizer gptq, found {quantizer.value}")
    if not calibrated and data is not None and not uses_text(method, plan_file):
        raise UsageError(f"--data: neither the method {method} nor the quantizer {quantizer.value} reads a text")
    runner: Runner | None = None if calibrated else choose_runner(jobs, device, ray)
    with open_model(model, dry_run) as source:
        layout = read_layout(source)
        show.note_limits(source, layout, progress)
        linear = linear_format(source, layout, linear_bits, linear_group_size)
        settings = QuantizeSettings(
            quantizer.value, one_bit.value, checked_group_size(group_size), linear, zero_points.value,
            gptq if calibrated else None, min_tokens,
        )  # fmt: skip
        check_output(output)
        check_sizes(source, layout, settings)
        text, facts, where = None, None, expert_devices(device, jobs if calibrated else None, calibrated and ray)
        if calibrated or data is not None:
            text = read_calibration(source, data, samples, seq_len, seed)
            facts = calibration_facts(text, where[0])
        if calibrated and text is not None:
            runner = GptqRunner(text, torch.get_num_threads(), where, compute_dtype(where[0]))
        if plan_file is not None:
            given = {"--avg-bits": avg_bits, "--budget-gib": budget_gib, "--overrides": overrides}
            _refuse_with_plan({**given, "--initial-model": initial_model, "--stats": stats})
            made = read_plan(plan_file)
            made.check_against(layout, str(plan_file))
            if made.source.get("fingerprint", source.fingerprint()) != source.fingerprint():
                progress.line(f"note: {plan_file} was made from other weights than {model}")
            if made.settings.quantizer not in (None, quantizer.value):
                progress.line(f"note: {plan_file} was made for --quantizer {made.settings.quantizer}")
        else:
            options = plan_options(
                source, layout, settings, avg_bits=avg_bits, bits=bits, budget_gib=budget_gib, overrides=overrides,
                initial_model=initial_model, stats=stats, method=method, zeta=zeta, promotion=promotion.value,
                counts=counts.value, ranking=ranking and ranking.value, seed=seed, ranked=not dry_run,
                calibrated=text is not None, quantizer=quantizer.value,
            )  # fmt: skip
            show.announce(options, progress)
            return_large_blocks()
            with with_statistics(source, layout, options, text, where[0], output, progress, resume) as known:
                made = make_plan(source, layout, known, progress)
        sizes = estimate(source, layout, made.experts, settings.group_size, settings.linear)
        if dry_run:
            measures = METHODS[made.method].measures if plan_file is None else ()
            jobs_at = expert_devices(device, jobs, False)
            reading = Reading.of(text, calibrated)
            needs = quantize_needs(source, layout, made.experts, sizes, settings, jobs_at, reading, measures)
            serving = serving_needs(source.config, layout, sizes, Service(context, concurrency, gpu_gib))
            report_quantize_needs(made.achieved_avg_bits, sizes, needs, serving, as_json)
            return
        return_large_blocks()
        quantize(
            source,
            layout,
            made,
            output,
            settings,
            progress,
            runner=runner,
            resume=resume,
            calibration=facts,
            describe=write_card,
        )
        served = architecture_of(source).unserved is None
    _report(made, output, sizes.as_dict(), as_json, served)


def uses_text(method: str, plan_file: Path | None) -> bool:
    """Tell whether making the plan needs calibration."""
    return plan_file is None and (method == "auto" or (method in METHODS and METHODS[method].calibrated))


def _refuse_with_plan(flags: dict[str, object]) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise UsageError(f"--plan and {flag}: expected one of them, found both")


def _report(made: Plan, output: Path, sizes: dict[str, Any], as_json: bool, served: bool) -> None:
    """Print the result."""
    if as_json:
        facts = {"achieved_avg_bits": made.achieved_avg_bits, "sizes": sizes}
        show.emit({**facts, "output": str(output), "experts": made.experts})
        return
    show.print_widths(made.experts)
    show.print_sizes(sizes)
    Console().print(f"wrote {output}{f'; serve it with: moeq serve {output}' if served else ''}", soft_wrap=True)

"""``moeq quantize``: plan, quantize, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from planner.calibration.gptq.runner import GptqRunner
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import CalibrationText, calibration_facts
from planner.commands import show
from planner.commands.flags.calibration import TextFlags
from planner.commands.flags.common import Json, Model, NewFolder
from planner.commands.flags.planning import PlanFlags
from planner.commands.flags.presets import with_preset
from planner.commands.flags.quantizing import GptqFlags, StorageFlags, WrittenQuantizerFlags
from planner.commands.flags.running import QuantizeRunFlags
from planner.commands.flags.service import ServiceFlags
from planner.commands.show_needs import report_quantize_needs
from planner.common.install import missing
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.common.schedule import Part
from planner.common.shown import say
from planner.estimates import Needs, Reading, serving_needs
from planner.estimates.parts import even_widths, planning_parts, quantizing_parts
from planner.estimates.quantizing import quantize_needs
from planner.model.hub import has_tokenizer
from planner.model.layout import Layout, architecture_of, read_layout
from planner.model.sizes import Sizes, estimate
from planner.model.skeleton import open_model
from planner.model.source import SourceModel
from planner.output.unfinished import check_output
from planner.plan import Plan, read_plan
from planner.planning.kept import PlanRequest, keep_plan, kept_plan
from planner.planning.make import make_plan
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions, check_options
from planner.planning.statistics import discard_statistics, reads_text, with_statistics
from planner.quantization.quantizers.table import QUANTIZERS, check_widths
from planner.quantization.run import quantize
from planner.quantization.runners import Runner
from planner.quantization.settings import QuantizeSettings, check_sizes
from planner.report.card import write_card
from planner.text.tokenizer import open_tokenizer
from vllm_moeq.format import MoeqError


@dataclass(frozen=True)
class _Work:
    """An open model, and the settings for its quantization.

    Attributes:
        source: the model.
        layout: its layers.
        settings: the settings of the quantizers.
        text: the text that the model reads, if any.
        devices: the first reads the text; a quantizer with calibration computes on all of them.
        progress: shows how far the work is.
    """

    source: SourceModel
    layout: Layout
    settings: QuantizeSettings
    text: CalibrationText | None
    devices: tuple[torch.device, ...]
    progress: Progress


def quantize_command(
    model: Model,
    output: NewFolder,
    plan_file: Annotated[
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
    progress, given = Progress(), text.data is not None
    quantizer = codes.resolved(given)
    calibrated, tuned = QUANTIZERS[quantizer].calibrated, gptq.settings()
    runner = None if calibrated else run.runner()
    with open_model(model, dry_run) as source:
        layout = read_layout(source)
        show.refuse_incomplete(source, layout, progress)
        show.note_limits(source, layout, progress)
        settings = QuantizeSettings(
            quantizer, codes.one_bit, storage.checked_group_size(), storage.linear(source, layout), codes.zero_points,
            tuned if calibrated else None, codes.min_tokens,
        )  # fmt: skip
        check_output(output)
        check_sizes(source, layout, settings)
        devices = run.expert_devices() if calibrated else (run.first_device(),)
        planning, load = with_preset(planning, service, source, layout, settings, text=given, progress=progress)
        found = text.read(source, planning.seed) if calibrated or given else None
        work = _Work(source, layout, settings, found, devices, progress)
        made = None if plan_file is None else _given_plan(work, plan_file, model)
        if dry_run:
            made = made or make_plan(source, layout, _options(work, planning, ranked=False), progress)
        else:
            made = _run(work, made, planning, output, run.resume, runner)
        sizes = estimate(source, layout, made.experts, settings.group_size, settings.linear, settings.scheme)
        if dry_run:
            needs = _needs(work, made, sizes, run, planned=plan_file is None)
            serving = serving_needs(source.config, layout, sizes, load)
            report_quantize_needs(made.achieved_avg_bits, sizes, needs, serving, as_json)
            return
        serve = _serve_command(source, output, progress)
    _report(made, output, sizes.as_dict(), as_json, serve)


def _options(work: _Work, planning: PlanFlags, ranked: bool = True) -> PlanOptions:
    """Return the options of the plan, and say what they leave open.

    Raises:
        UsageError: flags that cannot be met.
    """
    options = planning.options(work.source, work.layout, work.settings, text=work.text is not None, ranked=ranked)
    check_options(options)
    show.announce(options, work.progress)
    return options


def _run(
    work: _Work, given: Plan | None, planning: PlanFlags, output: Path, resume: bool, runner: Runner | None
) -> Plan:
    """Make a plan if none is given, and write the checkpoint; return the plan.

    Raises:
        MoeqError: flags that cannot be met, a damaged tensor, a full disk.
    """
    with work.progress.whole():
        if given is not None:
            work.progress.expect(_quantizing(work, given.experts))
            _write(work, given, output, runner, resume, None)
            return given
        made, keep = _make_plan(work, _options(work, planning), output, resume)
        _write(work, made, output, runner, resume, keep)
        return made


def _make_plan(work: _Work, options: PlanOptions, output: Path, resume: bool) -> tuple[Plan, Callable[[Path], None]]:
    """Return a plan, and what keeps it in the unfinished folder; an earlier run's plan is taken as it is.

    The plan's statistics, if it needs some, lie beside the output until it is kept.

    Raises:
        MoeqError: statistics or the plan of another run, a damaged tensor.
    """
    source, layout, text, device, progress = work.source, work.layout, work.text, work.devices[0], work.progress
    read = calibration_facts(text, device) if text is not None and reads_text(options) else None
    request = PlanRequest.of(source, options, read)
    earlier = kept_plan(output, request) if resume else None
    if earlier is not None:
        made = earlier
        progress.expect(_quantizing(work, made.experts))
    else:
        parts = planning_parts(source, layout, options, Reading.of(text), device)
        progress.expect([*parts, *_quantizing(work, even_widths(layout, options))])
        return_large_blocks()
        with with_statistics(source, layout, options, text, device, output, progress, resume) as known:
            made = make_plan(source, layout, known, progress)

    def keep(folder: Path) -> None:
        if earlier is not None:
            progress.line("plan: made by an earlier run")
        keep_plan(folder, request, made)
        discard_statistics(output)

    return made, keep


def _quantizing(work: _Work, experts: Mapping[str, Sequence[int]]) -> list[Part]:
    """Return the part of the run that follows the plan."""
    reading = Reading.of(work.text, gptq=True) if work.settings.calibrated else None
    return quantizing_parts(work.source, work.layout, experts, work.settings, work.devices, reading)


def _write(
    work: _Work, made: Plan, output: Path, runner: Runner | None, resume: bool, keep: Callable[[Path], None] | None
) -> None:
    """Quantize and write the checkpoint. A quantizer with calibration brings its own runner.

    Raises:
        MoeqError: a damaged tensor, a full disk.
    """
    text, device = work.text, work.devices[0]
    if work.settings.calibrated and text is not None:
        runner = GptqRunner(text, torch.get_num_threads(), work.devices, compute_dtype(device))
    return_large_blocks()
    quantize(
        work.source, work.layout, made, output, work.settings, work.progress, runner=runner, resume=resume,
        calibration=None if text is None else calibration_facts(text, device), claimed=keep, describe=write_card,
    )  # fmt: skip


def _given_plan(work: _Work, path: Path, model: str) -> Plan:
    """Return the plan of a file; say so where it was made for something else.

    Raises:
        MoeqError: no such file, no plan, the plan of another model, or widths that the quantizer does not offer.
    """
    made, fingerprint = read_plan(path), work.source.fingerprint()
    made.check_against(work.layout, str(path))
    for widths in made.experts.values():
        check_widths(work.settings.quantizer, widths)
    if made.source.get("fingerprint", fingerprint) != fingerprint:
        work.progress.line(f"note: {path} was made from other weights than {model}")
    if made.settings.quantizer not in (None, work.settings.quantizer):
        work.progress.line(f"note: {path} was made for --quantizer {made.settings.quantizer}")
    return made


def _needs(work: _Work, made: Plan, sizes: Sizes, run: QuantizeRunFlags, planned: bool) -> Needs:
    """Return the disk, memory and time of the work; a plan that is made here adds its statistics."""
    reading = Reading.of(work.text, work.settings.calibrated)
    measures = METHODS[made.method].measures if planned else ()
    devices = run.job_devices()
    return quantize_needs(work.source, work.layout, made.experts, sizes, work.settings, devices, reading, measures)


def _serve_command(source: SourceModel, output: Path, progress: Progress) -> str | None:
    """Return the command that serves the output, or None if vLLM cannot; say so if it needs a tokenizer."""
    if architecture_of(source).unserved is not None:
        return None
    if has_tokenizer(source.folder):
        try:
            if not missing(("transformers",)):
                open_tokenizer(source.folder)
        except MoeqError as error:
            progress.line(f"note: the output has the source's tokenizer, which cannot be used: {error}")
        return f"moeq serve {output}"
    progress.line(f"note: {source.folder} has no tokenizer, nor has {output}: vLLM needs --tokenizer NAME")
    return f"moeq serve {output} --tokenizer NAME"


def _report(made: Plan, output: Path, sizes: dict[str, Any], as_json: bool, serve: str | None) -> None:
    """Print the result."""
    if as_json:
        facts = {"achieved_avg_bits": made.achieved_avg_bits, "sizes": sizes}
        show.emit({**facts, "output": str(output), "experts": made.experts})
        return
    show.print_widths(made.experts)
    show.print_sizes(sizes)
    say(f"wrote {output}{f'; serve it with: {serve}' if serve else ''}")

"""``planner.quantize``: plan, quantize, write."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from planner.api import notes
from planner.api.call import takes
from planner.api.presets import with_preset
from planner.api.quantize_arguments import QuantizeKeywords, given_plan, sized
from planner.api.results import Estimate, Quantized
from planner.api.served import possible_serving
from planner.calibration.collect import StatisticsRequest
from planner.calibration.gptq.runner import GptqRunner
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import CalibrationText, calibration_facts
from planner.common.install import missing
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.common.schedule import Part
from planner.estimates import Needs, Reading
from planner.estimates.needs import largest
from planner.estimates.parts import even_widths, planning_parts, quantizing_parts
from planner.estimates.quantizing import quantize_needs
from planner.model.hub import has_tokenizer
from planner.model.layout import Layout, read_layout
from planner.model.recognize import why_unserved
from planner.model.sizes import Sizes, estimate
from planner.model.skeleton import open_model
from planner.model.source import SourceModel
from planner.output.paths import check_output
from planner.plan_file import Plan
from planner.planning.kept import PlanRequest, keep_plan, kept_plan
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions, check_options
from planner.planning.statistics import discard_statistics, reads_text, wanted_statistics, with_statistics
from planner.quantization.quantizers.table import (
    POSSIBLE,
    QUANTIZERS,
)
from planner.quantization.run import quantize as write_checkpoint
from planner.quantization.runners import Runner
from planner.quantization.settings import QuantizeSettings, check_sizes
from planner.quantization.speculation import with_speculation
from planner.reporting.card import write_card
from planner.text.tokenizer import load_tokenizer
from vllm_moeq.format import MoeqError


@dataclass(frozen=True)
class _Work:
    """An open model, and what decides its checkpoint.

    Attributes:
        wanted: the arguments.
        source: the model.
        layout: its layers.
        settings: the settings of the quantizers.
        text: the text that the model reads, if any.
        devices: the first reads the text; a quantizer with calibration computes on all of them.
        plan: the plan, if one is given.
        runner: the runner of a quantizer without calibration; None where the quantizer brings its own.
        progress: shows how far the work is.
    """

    wanted: QuantizeKeywords
    source: SourceModel
    layout: Layout
    settings: QuantizeSettings
    text: CalibrationText | None
    devices: tuple[torch.device, ...]
    plan: Plan | None
    runner: Runner | None
    progress: Progress

    @property
    def output(self) -> Path:
        """The folder to create."""
        return Path(self.wanted.output)


@takes(QuantizeKeywords, "quantize")
def quantize(wanted: QuantizeKeywords) -> Quantized:
    """Plan, quantize and write a checkpoint, as ``moeq quantize`` does. Continue a killed run.

    Raises:
        MoeqError: arguments that cannot be met, a damaged tensor, a full disk; its message is one line.
    """
    with _opened(wanted, dry_run=False) as work:
        made = _run(work)
        return Quantized(work.output, made, _sizes(work, made), _serve_command(work))


def estimate_quantize(wanted: QuantizeKeywords) -> Estimate:
    """Return what quantizing would take, and serving the result, from the headers.

    Raises:
        MoeqError: as :func:`quantize` does.
    """
    with _opened(wanted, dry_run=True) as work:
        made, statistics = work.plan, None
        if made is None:
            options = _options(work, ranked=False)
            made = make_plan(work.source, work.layout, options, work.progress)
            statistics = wanted_statistics(options) if options.measures else None
        sizes = _sizes(work, made)
        service, storage = work.wanted.service(), work.settings.with_plan(made).storage
        serving = possible_serving(work.source.config, work.layout, sizes, service, storage)
        return Estimate(_needs(work, made, sizes, statistics), made.achieved_avg_bits, sizes, serving)


@contextmanager
def _opened(wanted: QuantizeKeywords, dry_run: bool) -> Iterator[_Work]:
    """Open the model, and yield it with what decides its checkpoint; close it at the end.

    Raises:
        MoeqError: arguments that cannot be met, a damaged model, text or plan.
    """
    progress, quantizer = wanted.display(), wanted.resolved_quantizer(wanted.data is not None)
    calibrated, tuned = QUANTIZERS[quantizer].calibrated, wanted.gptq_settings()
    runner = None if calibrated else wanted.runner()
    with open_model(str(wanted.model), dry_run) as source:
        layout = read_layout(source)
        notes.refuse_incomplete(source, layout, progress)
        if wanted.mtp == "keep":
            layout = with_speculation(source, layout)
        notes.note_limits(source, layout, progress)
        settings = QuantizeSettings(
            quantizer, wanted.one_bit, wanted.checked_group_size(), wanted.linear(source, layout), wanted.zero_points,
            tuned if calibrated else None, wanted.min_tokens, wanted.resolved_linear_quantizer(calibrated),
            wanted.resolved_calibration(wanted.compat), wanted.settled_scheme,
        )  # fmt: skip
        check_output(Path(wanted.output))
        text_given = wanted.data is not None
        plan = None if wanted.plan is None else given_plan(wanted, wanted.plan, source, layout, settings)
        check_sizes(source, layout, *sized(wanted, settings, plan, text_given))
        devices = wanted.expert_devices() if calibrated else (wanted.first_device(),)
        wanted = with_preset(wanted, source, layout, settings, text_given)
        read = calibrated or text_given
        text = wanted.read_text(source, wanted.seed, progress) if read else None
        yield _Work(wanted, source, layout, settings, text, devices, plan, runner, progress)


def _options(work: _Work, ranked: bool = True) -> PlanOptions:
    """Return the options of the plan, and say what they leave open.

    Raises:
        UsageError: arguments that cannot be met.
    """
    options = work.wanted.plan_options(
        work.source, work.layout, work.settings, text=work.text is not None, ranked=ranked,
        scheme=work.wanted.resolved_scheme, linears=work.wanted.linears_compete,
    )  # fmt: skip
    check_options(options)
    notes.announce(options, work.progress)
    return options


def _run(work: _Work) -> Plan:
    """Make a plan if none is given, and write the checkpoint; return the plan.

    Raises:
        MoeqError: arguments that cannot be met, a damaged tensor, a full disk.
    """
    with work.progress.whole():
        if work.plan is not None:
            work.progress.expect(_quantizing(work, work.plan.experts))
            _write(work, work.plan, None)
            return work.plan
        made, keep = _make_plan(work, _options(work))
        _write(work, made, keep)
        return made


def _make_plan(work: _Work, options: PlanOptions) -> tuple[Plan, Callable[[Path], None]]:
    """Return a plan, and what keeps it in the unfinished folder; an earlier run's plan is taken as it is.

    The plan's statistics, if it needs some, lie beside the output until it is kept.

    Raises:
        MoeqError: statistics or the plan of another run, a damaged tensor.
    """
    source, layout, text, device, progress = work.source, work.layout, work.text, work.devices[0], work.progress
    output, resume = work.output, work.wanted.resume
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
    reading = Reading.of(work.text, work.settings.streams, work.settings.sweeps) if work.settings.calibrated else None
    return quantizing_parts(work.source, work.layout, experts, work.settings, work.devices, reading)


def _write(work: _Work, made: Plan, keep: Callable[[Path], None] | None) -> None:
    """Quantize and write the checkpoint. A quantizer with calibration brings its own runner.

    Raises:
        MoeqError: a damaged tensor, a full disk.
    """
    text, device, runner = work.text, work.devices[0], work.runner
    notes.note_schemes(work.settings, made, work.progress)
    if work.settings.calibrated and text is not None:
        runner = GptqRunner(text, torch.get_num_threads(), work.devices, compute_dtype(device))
    return_large_blocks()
    write_checkpoint(
        work.source, work.layout, made, work.output, work.settings, work.progress, runner=runner,
        resume=work.wanted.resume, calibration=None if text is None else calibration_facts(text, device), claimed=keep,
        describe=write_card,
    )  # fmt: skip


def _sizes(work: _Work, made: Plan) -> Sizes:
    """Return the bytes of the source, and of the checkpoint."""
    settings = work.settings.with_plan(made)
    return estimate(work.source, work.layout, made.experts, settings.group_size, settings.linear, settings.storage)


def _needs(work: _Work, made: Plan, sizes: Sizes, wanted: StatisticsRequest | None) -> Needs:
    """Return the disk, memory and time of the work; a plan that is made here adds its statistics."""
    reading = Reading.of(work.text, work.settings.streams, work.settings.sweeps)
    devices, settings = work.wanted.job_devices(), work.settings.with_plan(made)
    schemes = POSSIBLE[work.wanted.resolved_scheme] if work.plan is None else (settings.scheme,)
    ways = (replace(settings, scheme=scheme) for scheme in schemes)
    return largest(
        [quantize_needs(work.source, work.layout, made.experts, sizes, it, devices, reading, wanted) for it in ways]
    )


def _serve_command(work: _Work) -> str | None:
    """Return the command that serves the output, or None if vLLM cannot; say so if it needs a tokenizer."""
    source, output, progress = work.source, work.output, work.progress
    serve = ["moeq", "serve", str(output)]
    if why_unserved(source.config) is not None:
        return None
    if has_tokenizer(source.folder):
        try:
            if not missing(("transformers",)):
                load_tokenizer(source.folder)
        except MoeqError as error:
            progress.line(f"note: the output has the source's tokenizer, which cannot be used: {error}")
        return shlex.join(serve)
    progress.line(f"note: {source.folder} has no tokenizer, nor has {output}: vLLM needs --tokenizer NAME")
    return shlex.join([*serve, "--tokenizer", "NAME"])

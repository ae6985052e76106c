"""Quantize a model by a plan and write the checkpoint, one decoder layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from planner.common.progress import Progress
from planner.model.hub import companion_bytes, companions
from planner.model.layout import Layout
from planner.model.sizes import Sizes, estimate
from planner.model.source import SourceModel
from planner.output.checkpoint import CheckpointWriter, check_space
from planner.output.paths import check_output
from planner.plan_file import Plan
from planner.quantization.layer_task import LINEAR_FALLBACK, Finished, LayerTask, merged_report, plan_tasks
from planner.quantization.quantizers import QUANTIZERS
from planner.quantization.record import FILE as REPORT
from planner.quantization.record import describe_source
from planner.quantization.runners import InlineRunner, Runner, Work
from planner.quantization.settings import QuantizeSettings, check_sizes
from planner.quantization.speculation import without_speculation
from vllm_moeq.format import GRID, CheckpointError, MoeqConfig, Rotation, UsageError, read_json, version_for

QUANTIZING = "quantizing"
"""Name of this work in the progress."""

HEADROOM_BYTES = 4 << 20
"""Bytes for headers, index and config in the check for free space."""


def build_config(layout: Layout, plan: Plan, settings: QuantizeSettings) -> MoeqConfig:
    """Return the ``quantization_config`` of the output.

    Raises:
        UsageError: a quantizer's results belong to another scheme than the format stores an expert by.
    """
    linear = settings.linear.stored(layout.linears)
    first = [*layout.routers, *(name for name in layout.kept if name == "lm_head.weight")]
    unquantized = [*first, *(name for name in layout.linears if settings.linear.bits_of(name) == 16)]
    unquantized += [name for name in layout.plain if name not in first]
    schemes, rotation = _schemes(plan, settings), _rotation(layout, settings)
    made = MoeqConfig(
        quant_method="moeq",
        format_version=version_for(linear, schemes, rotation),
        group_size=settings.group_size,
        projections=layout.layers[0].projections,
        experts=plan.experts,
        linear=linear,
        unquantized=[name.removesuffix(".weight") for name in unquantized],
        plan=plan.summary(settings.quantizer),
        schemes=schemes,
        rotation=rotation,
    )
    _check_schemes(made, settings)
    return made


def _schemes(plan: Plan, settings: QuantizeSettings) -> dict[str, list[str]] | None:
    """Return the schemes of the layers that do not have grids alone, or None if there are none."""
    names = {
        prefix: [scheme.name for scheme in settings.storage.schemes(prefix, widths)]
        for prefix, widths in plan.experts.items()
    }
    return {prefix: found for prefix, found in names.items() if set(found) != {GRID.name}} or None


def _rotation(layout: Layout, settings: QuantizeSettings) -> Rotation | None:
    """Return the rotation that all layers share.

    Raises:
        UsageError: layers have sizes that need different rotations.
    """
    found = {settings.rotation(layer) for layer in layout.layers}
    if len(found) > 1:
        raise UsageError(f"--scheme {settings.scheme}: expected layers of one size, found rotations of several sizes")
    return found.pop()


def _check_schemes(config: MoeqConfig, settings: QuantizeSettings) -> None:
    """Refuse quantizers whose results belong to another scheme than the config says."""
    for prefix, widths in config.experts.items():
        for expert, bits in enumerate(widths):
            stored = config.scheme(prefix, expert)
            alone = settings.without_text(bits, stored)
            for name in (alone, settings.quantizer_of(stored)) if settings.calibrated else (alone,):
                if (own := QUANTIZERS[name].scheme) is not stored:
                    raise UsageError(
                        f"quantizer {name}: expected results of the scheme {stored.name}, which format version "
                        f"{config.format_version} stores for {prefix}.{expert}, found {own.name}"
                    )


def with_fallbacks(config: MoeqConfig, report: Mapping[str, Any]) -> MoeqConfig:
    """Return the config with the experts that were not quantized as requested."""
    found = {
        layer["prefix"]: [entry["expert"] for entry in layer["experts"] if "fallback" in entry]
        for layer in report["layers"]
    }
    found = {prefix: experts for prefix, experts in found.items() if experts}
    return config.model_copy(update={"plan": config.plan.model_copy(update={"fallback": found or None})})


def fingerprint(
    model: SourceModel,
    plan: Plan,
    settings: QuantizeSettings,
    calibration: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> dict[str, Any]:
    """Return everything that decides the output; messages show the keys."""
    return {
        "model": model.fingerprint(),
        "plan": plan.model_dump(mode="json", exclude={"cost"}),
        "settings": settings.as_dict(),
        "calibration": dict(calibration) if calibration else None,
        **({"mtp": "keep"} if layout is not None and layout.speculative else {}),
    }


def quantize(
    model: SourceModel,
    layout: Layout,
    plan: Plan,
    output: Path,
    settings: QuantizeSettings,
    progress: Progress,
    *,
    runner: Runner | None = None,
    resume: bool = True,
    calibration: Mapping[str, Any] | None = None,
    claimed: Callable[[Path], None] | None = None,
    describe: Callable[[Path], None] | None = None,
) -> Sizes:
    """Write the quantized checkpoint. The output folder appears only when it is complete.

    Args:
        model: the source.
        layout: the source's layout.
        plan: one width per expert, and perhaps one per linear.
        output: folder to create.
        settings: how to quantize.
        progress: shows the progress.
        runner: runs the layers' tasks; None runs them one by one here.
        resume: continue an unfinished run instead of deleting it.
        calibration: facts about the runner's calibration text, for the report.
        claimed: function that may keep files in the unfinished folder, once it is this run's.
        describe: function that may add files to the complete folder, such as ``write_card``.

    Returns:
        The estimated sizes.

    Raises:
        MoeqError: what the headers reveal, before anything is written; later a damaged tensor or a full disk.
    """
    plan.check_against(layout, "plan")
    settings = settings.with_plan(plan)
    check_sizes(model, layout, settings, settings.storage.all_schemes(plan.experts))
    check_output(output)
    sizes = estimate(model, layout, plan.experts, settings.group_size, settings.linear, settings.storage)
    check_space(output, sizes.total_bytes + companion_bytes(model.folder) + HEADROOM_BYTES)
    config = build_config(layout, plan, settings)
    writer = CheckpointWriter(output, fingerprint(model, plan, settings, calibration, layout), resume)
    try:
        if claimed is not None:
            claimed(writer.partial)
        tasks = plan_tasks(model, layout, plan, settings, writer.partial)
        _run(tasks, writer, runner or InlineRunner(torch.get_num_threads()), progress)
        model.shards.check_unchanged()
        report = merged_report(tasks, [read_json(task.entry) for task in tasks], settings)
        report["source"] = describe_source(model)
        if calibration:
            report["calibration"] = dict(calibration)
        writer.copy(model.folder, companions(model.folder))
        writer.finish(*_files(model, layout, plan, with_fallbacks(config, report), report), describe)
    except BaseException:
        writer.abandon()
        raise
    _note_fallbacks(report, settings, progress)
    return sizes


def _note_fallbacks(report: Mapping[str, Any], settings: QuantizeSettings, progress: Progress) -> None:
    """Say how many experts the calibration did not reach, and what helps."""
    experts = [entry for layer in report["layers"] for entry in layer["experts"]]
    missed = sum("fallback" in entry for entry in experts)
    if missed:
        progress.line(
            f"note: {missed} of {len(experts)} experts were quantized without calibration, most for fewer than "
            f"{settings.min_tokens} tokens; more --samples, a longer text or a lower --min-tokens reach more"
        )
    if linears := report.get(LINEAR_FALLBACK):
        name, reason = next(iter(linears.items()))
        more = f", and {len(linears) - 1} more" if len(linears) > 1 else ""
        progress.line(f"note: linear {name} was rounded without calibration: {reason}{more}")


def _files(
    model: SourceModel, layout: Layout, plan: Plan, config: MoeqConfig, report: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of config.json, and name → contents of the other JSON files."""
    quantization_config = config.model_dump(mode="json", exclude_none=True)
    # The time that planning took is left out, so that the same input makes the same bytes.
    extra = {"plan.json": plan.model_dump(mode="json", exclude={"cost"}), REPORT: report}
    told = model.config if layout.speculative else without_speculation(model.config)
    return {**told, "quantization_config": quantization_config}, extra


def _run(tasks: list[LayerTask], writer: CheckpointWriter, runner: Runner, progress: Progress) -> None:
    """Run the tasks that no earlier run has finished, and register all shards."""
    pending = tuple(task for task in tasks if not (task.entry.is_file() and writer.has_shard(task.shard.name)))
    for task in tasks:
        if task not in pending:
            progress.line(f"{task.label}: done by an earlier run")
    work = Work(tuple(tasks), pending)
    with closing(runner.run(work)) as finished:
        for done in progress.track(finished, QUANTIZING, len(pending)):
            if not writer.has_shard(done.task.shard.name):
                raise CheckpointError(f"{done.task.shard}: expected a shard of another process, found none")
            _say(progress, done)


def _say(progress: Progress, done: Finished) -> None:
    if not done.experts:
        return
    widths = done.task.widths
    counts = ", ".join(f"{widths.count(bits)} × {bits} bit" for bits in sorted(set(widths), reverse=True))
    worst = max(done.experts, key=lambda report: report.relative_error)
    count = sum(report.fallback is not None for report in done.experts)
    fallbacks = f"{count} fallback{'s' if count > 1 else ''}, " if count else ""
    progress.line(
        f"{done.task.label}: {counts}; largest relative error {worst.relative_error:.3f} "
        f"(expert {worst.expert}, {worst.bits} bit), {fallbacks}"
        f"{done.seconds:.1f} s, {done.memory_bytes / (1 << 30):.2f} GiB; {progress.where()}"
    )

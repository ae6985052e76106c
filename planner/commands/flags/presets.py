"""Put the flags of a preset in the place of those that the command line leaves out."""

from __future__ import annotations

from dataclasses import replace

from planner.commands.flags.planning import PlanFlags
from planner.commands.flags.service import ServiceFlags
from planner.common.progress import Progress
from planner.estimates import Service
from planner.estimates.presets import PRESETS, budget_for
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.quantization.settings import QuantizeSettings


def with_preset(
    planning: PlanFlags,
    service: ServiceFlags,
    model: SourceModel,
    layout: Layout,
    settings: QuantizeSettings,
    *,
    text: bool,
    progress: Progress,
) -> tuple[PlanFlags, Service]:
    """Return the flags of the plan and the load to serve, and name what a preset stands for.

    Args:
        planning: the flags of the plan.
        service: the flags of the load.
        model: the source.
        layout: its layers.
        settings: how it will be quantized.
        text: whether a calibration text is given.
        progress: prints the line.

    Raises:
        UsageError: a preset that cannot be met.
    """
    name = planning.preset
    if name is None:
        return planning, service.service()
    row = PRESETS[name]
    load = service.service(row.service or Service())
    if planning.avg_bits is None and planning.budget_gib is None:
        if row.service is None:
            planning = replace(planning, avg_bits=row.average)
        else:
            budget = budget_for(name, model, layout, settings, planning.choices(text), load)
            planning = replace(planning, budget_gib=budget)
    progress.line(f"preset {name}: {_flags(planning, None if row.service is None else load)}")
    return planning, load


def _flags(planning: PlanFlags, load: Service | None) -> str:
    """Return the flags that a preset and the command line come to."""
    flags = {"--avg-bits": planning.avg_bits, "--budget-gib": planning.budget_gib}
    if load is not None:
        flags |= {"--context": load.context, "--concurrency": load.concurrency, "--gpu-gib": load.gpu_gib}
    return " ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in flags.items()
        if value is not None
    )

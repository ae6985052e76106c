"""Put what a preset stands for in the place of the arguments that are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from planner.api.keywords.common import ProgressKeyword
from planner.api.keywords.service import ServiceKeywords
from planner.api.keywords.widths import WidthKeywords
from planner.estimates import Service
from planner.estimates.presets import PRESETS, budget_for
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import UsageError


@dataclass(frozen=True, kw_only=True)
class PresetKeywords(ProgressKeyword, ServiceKeywords, WidthKeywords):
    """The arguments that a preset stands for."""


Wanted = TypeVar("Wanted", bound=PresetKeywords)


def with_preset(wanted: Wanted, model: SourceModel, layout: Layout, settings: QuantizeSettings, text: bool) -> Wanted:
    """Return the arguments with those of their preset, and name them in a note.

    Args:
        wanted: the arguments.
        model: the source.
        layout: its layers.
        settings: how it will be quantized.
        text: whether a calibration text is given.

    Raises:
        UsageError: a preset that cannot be met, or beside a number that it stands for.
    """
    name = wanted.preset
    if name is None:
        return wanted
    for flag, value in (("--avg-bits", wanted.avg_bits), ("--budget-gib", wanted.budget_gib)):
        if value is not None:
            raise UsageError(f"--preset {name} and {flag}: expected one of them, found both")
    row = PRESETS[name]
    load = wanted.service(row.service or Service())
    wanted = replace(wanted, **vars(load))
    if row.service is None:
        wanted = replace(wanted, avg_bits=row.average)
    else:
        wanted = replace(wanted, budget_gib=budget_for(name, model, layout, settings, wanted.choices(text), load))
    wanted.display().line(f"preset {name}: {_flags(wanted, None if row.service is None else load)}")
    return wanted


def _flags(wanted: PresetKeywords, load: Service | None) -> str:
    """Return the flags that a preset and the given arguments come to."""
    flags = {"--avg-bits": wanted.avg_bits, "--budget-gib": wanted.budget_gib}
    if load is not None:
        flags |= {"--context": load.context, "--concurrency": load.concurrency, "--gpu-gib": load.gpu_gib}
    return " ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in flags.items()
        if value is not None
    )

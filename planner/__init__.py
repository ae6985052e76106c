"""The offline half: score experts, plan their widths, quantize and write the checkpoint.

A function per command, which takes the command's flags as keyword arguments and prints nothing::

    import planner

    made = planner.quantize("owner/name", avg_bits=2.5, data="wikitext2", output="quantized", progress=print)
    found = planner.evaluate(made.output, data="held_out.txt", reference="owner/name")
    print(made.achieved_avg_bits, found.perplexity)

Importing this package loads neither torch nor typer; using one of its names does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api.calibrating import calibrate
    from planner.api.comparing import compare
    from planner.api.estimating import estimate
    from planner.api.evaluating import evaluate
    from planner.api.planning import plan
    from planner.api.quantizing import quantize
    from planner.api.reporting import report
    from planner.api.results import Calibrated, Compared, Estimate, Evaluated, Planned, Quantized, Reported
    from planner.common.progress import Event, Progress
    from vllm_moeq.format import CheckpointError, ConfigError, MoeqError, UsageError

__all__ = [
    "Calibrated",
    "CheckpointError",
    "Compared",
    "ConfigError",
    "Estimate",
    "Evaluated",
    "Event",
    "MoeqError",
    "Planned",
    "Progress",
    "Quantized",
    "Reported",
    "UsageError",
    "calibrate",
    "compare",
    "estimate",
    "evaluate",
    "plan",
    "quantize",
    "report",
]

_HOMES = {
    "planner.api.calibrating": ("calibrate",),
    "planner.api.comparing": ("compare",),
    "planner.api.estimating": ("estimate",),
    "planner.api.evaluating": ("evaluate",),
    "planner.api.planning": ("plan",),
    "planner.api.quantizing": ("quantize",),
    "planner.api.reporting": ("report",),
    "planner.api.results": ("Calibrated", "Compared", "Estimate", "Evaluated", "Planned", "Quantized", "Reported"),
    "planner.common.progress": ("Event", "Progress"),
    "vllm_moeq.format": ("CheckpointError", "ConfigError", "MoeqError", "UsageError"),
}
"""Module → the names of this package that it defines, and that it is imported for."""


if not TYPE_CHECKING:  # a type checker would take any name for one of this package

    def __getattr__(name: str) -> Any:
        """Import a name of this package when it is first used."""
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(home), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of this package."""
    return sorted({*globals(), *__all__})

"""``planner.estimate``: what a call would take, without doing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

from planner.api.calibrating import CalibrateKeywords, calibrate, estimate_calibrate
from planner.api.call import read
from planner.api.comparing import CompareKeywords, compare, estimate_compare
from planner.api.evaluating import EvaluateKeywords, estimate_evaluate, evaluate
from planner.api.planning import PlanKeywords, estimate_plan, plan
from planner.api.quantize_arguments import QuantizeKeywords
from planner.api.quantizing import estimate_quantize, quantize
from planner.api.results import Estimate
from planner.common.mistakes import named_mistakes
from vllm_moeq.format import UsageError

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class _Row:
    """How the needs of a function are estimated.

    Attributes:
        arguments: the dataclass of its arguments.
        command: the command whose flags they are.
        needs: estimates.
    """

    arguments: Callable[..., Any]
    command: str
    needs: Callable[[Any], Estimate]


ESTIMATES: dict[Callable[..., Any], _Row] = {
    plan: _Row(PlanKeywords, "plan", estimate_plan),
    quantize: _Row(QuantizeKeywords, "quantize", estimate_quantize),
    calibrate: _Row(CalibrateKeywords, "calibrate", estimate_calibrate),
    compare: _Row(CompareKeywords, "compare", estimate_compare),
    evaluate: _Row(EvaluateKeywords, "eval", estimate_evaluate),
}
"""Function → its estimate."""


def estimate(function: Callable[Arguments, object], *values: Arguments.args, **named: Arguments.kwargs) -> Estimate:
    """Return what a call would take, as ``--dry-run`` says it: disk, memory, time, and GPUs to serve the output.

    Example: ``planner.estimate(planner.quantize, "owner/name", avg_bits=2.5, output="quantized")``

    Args:
        function: ``planner.plan``, ``quantize``, ``calibrate``, ``compare`` or ``evaluate``.
        values: its positional arguments.
        named: its keyword arguments.

    Raises:
        MoeqError: as the function does; or nobody can tell what this one takes.
    """
    row = ESTIMATES.get(function)
    if row is None:
        known = ", ".join(known.__name__ for known in ESTIMATES)
        raise UsageError(f"estimate: expected one of the functions {known}, found {function!r}")
    with named_mistakes():
        return row.needs(read(row.arguments, row.command, values, named, dry_run=True))

"""Flags and keyword arguments are the same: names, defaults, bounds, choices."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import typer

import planner
from planner.api.calibrating import CalibrateKeywords
from planner.api.comparing import CompareKeywords
from planner.api.evaluating import EvaluateKeywords
from planner.api.keywords.common import parts
from planner.api.planning import PlanKeywords
from planner.api.quantize_arguments import QuantizeKeywords
from planner.api.reporting import ReportKeywords
from planner.cli import app
from tests.planner.commands.test_flags import choices
from vllm_moeq.format import UsageError

FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "plan": (planner.plan, PlanKeywords),
    "quantize": (planner.quantize, QuantizeKeywords),
    "calibrate": (planner.calibrate, CalibrateKeywords),
    "compare": (planner.compare, CompareKeywords),
    "eval": (planner.evaluate, EvaluateKeywords),
    "report": (planner.report, ReportKeywords),
}
ELSEWHERE = {"dry_run": "planner.estimate", "as_json": "as_dict() of the result"}
"""Flags that are no arguments, and what takes their place."""

RENAMED = {("calibrate", "methods"): "--for"}
"""Flags whose name Python keeps for itself."""

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def flags(command: str) -> dict[str, Any]:
    """Return the parameters of a command that its function has."""
    return {item.name: item for item in COMMANDS[command].params if item.name not in ELSEWHERE}


FLAGS = [(command, name) for command in FUNCTIONS for name in flags(command)]


@pytest.mark.parametrize("command", FUNCTIONS)
def test_every_flag_is_an_argument_and_no_other_is(command: str) -> None:
    function, _ = FUNCTIONS[command]
    assert set(inspect.signature(function).parameters) == {*flags(command), "progress"}


@pytest.mark.parametrize(("command", "name"), FLAGS)
def test_names_and_defaults_are_the_same(command: str, name: str) -> None:
    flag, argument = flags(command)[name], inspect.signature(FUNCTIONS[command][0]).parameters[name]
    if flag.param_type_name == "option":
        assert RENAMED.get((command, name), f"--{name.replace('_', '-')}") in flag.opts
    assert flag.required == (argument.default is inspect.Parameter.empty)
    if flag.required:
        return
    default = getattr(flag.default, "value", flag.default)
    expected = argument.default
    assert default == (",".join(parts(expected)) if isinstance(expected, tuple) else expected)


def least(annotation: Any) -> int | None:
    """Return the least value that a type takes, if it says one."""
    if get_origin(annotation) is Annotated:
        _, *rest = get_args(annotation)
        return next(
            (bound.ge for item in rest for bound in getattr(item, "metadata", ()) if hasattr(bound, "ge")), None
        )
    return next((low for part in get_args(annotation) if (low := least(part)) is not None), None)


@pytest.mark.parametrize(("command", "name"), FLAGS)
def test_bounds_are_the_same(command: str, name: str) -> None:
    flag = flags(command)[name]
    kind = getattr(flag, "type_descriptor", None) or flag.type  # typer's own parser, or click's
    hint = get_type_hints(FUNCTIONS[command][1], include_extras=True)[name]
    assert least(hint) == getattr(getattr(kind, "parameter_info", kind), "min", None)


VALID: dict[str, dict[str, Any]] = {
    "plan": {"model": "m"},
    "quantize": {"model": "m", "output": "o"},
    "calibrate": {"model": "m", "output": "o"},
    "compare": {"model": "m", "output": "o", "held_out": "h"},
    "eval": {"model": "m"},
    "report": {"folder": "m"},
}


@pytest.mark.parametrize(("command", "name"), [row for row in FLAGS if choices(flags(row[0])[row[1]])])
def test_choices_are_the_same(command: str, name: str) -> None:
    function, _ = FUNCTIONS[command]
    with pytest.raises(UsageError) as refused:
        function(**VALID[command], **{name: "nonsense"})
    message = str(refused.value)
    assert message.startswith(f"--{name.replace('_', '-')}: expected ")
    assert message.endswith(", found 'nonsense'")
    assert all(choice in message for choice in choices(flags(command)[name]))

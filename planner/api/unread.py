"""Arguments that are read only where others ask for it: elsewhere they are refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.api.keywords.common import parts
from planner.api.keywords.widths import read_choices
from planner.api.results import Planned
from planner.calibration.measures import MEASURES
from planner.estimates.presets import PRESETS
from planner.plan_file import Plan, read_plan
from planner.planning.method import Method
from planner.planning.methods import METHODS
from planner.planning.request import resolved_method
from planner.quantization.quantizers.table import (
    POSSIBLE,
    QUANTIZERS,
    calibrated_names,
    default_quantizer,
    possible_schemes,
    tuned_names,
)
from vllm_moeq.format import BIT_WIDTHS, GRID, MoeqError, UsageError

Values = Mapping[str, Any]
"""Parameter → value, of all parameters of a command, as a flag's text or a value of Python; others are missing."""


@dataclass(frozen=True)
class ReadOnlyWhere:
    """These parameters are read only where a condition holds.

    Attributes:
        flags: names of parameters.
        holds: the condition; it must not raise for values that are refused elsewhere.
        needs: what the condition needs, as a text for "expected … with it".
        found: what is there instead.
        commands: the commands for which the row holds; all with these flags where it is empty.
    """

    flags: tuple[str, ...]
    holds: Callable[[Values], bool]
    needs: str
    found: Callable[[Values], str]
    commands: tuple[str, ...] = ()


def refuse_unread(command: str, given: Mapping[str, str], values: Values) -> None:
    """Refuse an argument that is given and would be ignored.

    Args:
        command: the command.
        given: name of each given parameter → its name for people.
        values: all parameters of the command.

    Raises:
        UsageError: naming the flag, and what it needs.
    """
    for row in ROWS:
        if row.commands and command not in row.commands:
            continue
        for name in row.flags:
            if name in given and not row.holds(values):
                raise UsageError(f"{given[name]}: expected {row.needs} with it, found {row.found(values)}")


def _methods(values: Values) -> list[str]:
    """Return the names of the methods that the command uses; unknown ones are left out."""
    if "methods" in values:
        names = tuple(METHODS) if values["methods"] == "all" else parts(values["methods"])
    else:
        known = values.get("stats") is not None or values.get("data") is not None
        names = (resolved_method(str(values["method"]), known),)
    return [name for name in names if name in METHODS]


def _some_method(reads: Callable[[Method, Values], bool]) -> Callable[[Values], bool]:
    """Return the condition that one of the command's methods reads the flag. Unknown methods are refused elsewhere."""

    def holds(values: Values) -> bool:
        names = _methods(values)
        return not names or any(reads(METHODS[name], values) for name in names)

    return holds


def _found_methods(values: Values) -> str:
    return f"--method{'s' if 'methods' in values else ''} {','.join(_methods(values))}"


def _methods_that(reads: Callable[[Method], Any]) -> str:
    """Return the methods of the table that read a flag, for a message."""
    return f"a method that reads it ({', '.join(name for name, method in METHODS.items() if reads(method))})"


def _quantizer(values: Values) -> str:
    return str(values["quantizer"] or default_quantizer(values["data"] is not None))


def _calibrated(values: Values) -> bool:
    """Tell whether the quantizer reads a text."""
    return QUANTIZERS[_quantizer(values)].calibrated


def _text_is_read(values: Values) -> bool:
    """Tell whether the quantizer reads a text, or the method does: it does not where a plan or statistics are given."""
    if "one_bit" in values and _calibrated(values):
        return True
    if values.get("plan") is not None or values.get("stats") is not None:
        return False
    return _some_method(lambda method, _: method.calibrated or bool(method.only_compared))(values)


def _found_text(values: Values) -> str:
    """Return what the command has instead of something that reads a text."""
    quantizer = [f"--quantizer {_quantizer(values)}"] if "one_bit" in values else []
    others = [f"--{name} {_named(values[name])}" for name in ("plan", "stats") if values.get(name) is not None]
    return " and ".join([*(others or [_found_methods(values)]), *quantizer])


def _named(value: object) -> str:
    """Return a file's name, or what stands for a plan that is in no file."""
    plan = value.plan if isinstance(value, Planned) else value
    return f"by {plan.method}" if isinstance(plan, Plan) else str(plan)


def _counted(method: Method, values: Values) -> bool:
    return method.order is not None or (method.one_width and values.get("overrides") is not None)


def _competing(method: Method, values: Values) -> bool:
    return not method.layerwise and (method.costs is not None or _counted(method, values))


def _with_choices(method: Method, _: Values) -> bool:
    """Tell whether a method of ``moeq compare`` chooses among widths."""
    return not method.one_width and not method.only_compared


def _measured_widths(values: Values) -> bool:
    """Tell whether statistics for the methods depend on widths."""
    measures = [MEASURES[measure] for method in _methods(values) for measure in METHODS[method].measures]
    return not _methods(values) or any("{bits}" in name for measure in measures for name in measure.names)


def _one_bit(values: Values) -> bool:
    return values["bits"] is None or "1" in parts(values["bits"])


def _is_given(name: str) -> Callable[[Values], bool]:
    return lambda values: bool(values.get(name))


def _for_a_gpu(values: Values) -> bool:
    """Tell whether a preset of the command depends on a GPU."""
    return values["preset"] is not None and PRESETS[values["preset"]].service is not None


def _schemes(values: Values) -> tuple[str, ...]:
    """Return the schemes that the command is asked for; none where it has no such flag or leaves it to the default."""
    return parts(values["scheme"]) if values.get("scheme") is not None else ()


def _plan(values: Values) -> Plan | None:
    """Return the plan that is given; none where it cannot be read, which is refused elsewhere."""
    given = values.get("plan")
    if isinstance(given, Planned):
        return given.plan
    if given is None or isinstance(given, Plan):
        return given
    try:
        return read_plan(Path(given))
    except MoeqError:
        return None


def _widths(values: Values) -> set[int]:
    """Return the widths that experts may get; all of the format where they cannot be read."""
    if values.get("bits") is None:
        return {bits for name in _methods(values) for bits in METHODS[name].choices} or set(BIT_WIDTHS)
    try:
        return set(read_choices(values["bits"]))
    except UsageError:
        return set(BIT_WIDTHS)


def _grid_widths(values: Values) -> set[int]:
    """Return the widths of experts that may be grids."""
    plan = _plan(values)
    if plan is not None and plan.schemes:
        return {
            bits
            for prefix, widths in plan.experts.items()
            for bits, scheme in zip(widths, plan.schemes[prefix], strict=True)
            if scheme == GRID.name
        }
    choices = [choice for choice in POSSIBLE if choice in (_schemes(values) or (GRID.name,))]
    return {bits for choice in choices for bits in _widths(values) if GRID in possible_schemes(choice, [bits])}


def _only_grids(values: Values) -> bool:
    """Tell whether all experts are grids that are not rotated."""
    plan = _plan(values)
    return not (plan is not None and plan.schemes) and set(_schemes(values)) <= {GRID.name}


def _found_schemes(values: Values) -> str:
    plan = _plan(values)
    if plan is not None and plan.schemes:
        return f"--plan {_named(values['plan'])}, which says how each expert is stored"
    return f"--scheme {','.join(_schemes(values))}"


def _nothing(_: Values) -> str:
    return "none"


QUANTIZER = f"--quantizer {' or '.join(calibrated_names())}"
GPTQ = ("act_order", "static_groups", "symmetric", "scale_search", "sweeps", "compat")
PLANNED = (
    "avg_bits", "budget_gib", "preset", "bits", "method", "zeta", "promotion", "counts", "ranking", "initial_model",
    "stats", "overrides",
)  # fmt: skip

ROWS: Sequence[ReadOnlyWhere] = (
    ReadOnlyWhere(
        PLANNED, lambda values: values.get("plan") is None, "no plan",
        lambda values: f"--plan {_named(values['plan'])}", ("quantize",),
    ),
    ReadOnlyWhere(
        ("zeta", "promotion"), _some_method(lambda method, _: method.promotes),
        _methods_that(lambda method: method.promotes), _found_methods,
    ),
    ReadOnlyWhere(("counts",), _some_method(_counted), _methods_that(lambda method: method.order), _found_methods),
    ReadOnlyWhere(
        ("ranking",), _some_method(_competing), _methods_that(lambda method: _competing(method, {})), _found_methods
    ),
    ReadOnlyWhere(
        ("overrides",), _some_method(lambda method, _: not method.layerwise), "a method for single experts",
        _found_methods,
    ),
    ReadOnlyWhere(
        ("initial_model",), _some_method(lambda method, _: "router_norm" in method.metrics),
        _methods_that(lambda method: "router_norm" in method.metrics), _found_methods,
    ),
    ReadOnlyWhere(
        ("stats",), _some_method(lambda method, _: method.calibrated), _methods_that(lambda method: method.calibrated),
        _found_methods,
    ),
    ReadOnlyWhere(
        ("data",), _text_is_read, "a method or a quantizer that reads a text", _found_text,
        ("plan", "quantize", "compare"),
    ),
    ReadOnlyWhere(
        ("samples", "seq_len"), _is_given("data"), "--data TEXT", _nothing, ("plan", "quantize", "compare", "calibrate")
    ),
    ReadOnlyWhere(
        ("seeds",), _some_method(lambda method, _: method.random or method.calibrated or bool(method.only_compared)),
        "a method that draws at random or reads a text", _found_methods,
    ),
    ReadOnlyWhere(
        ("seed",),
        lambda values: values["data"] is not None
        or (values.get("plan") is None and _some_method(lambda method, _: method.random)(values)),
        "--data TEXT or --method random", _nothing, ("plan", "quantize"),
    ),
    ReadOnlyWhere(
        ("bits",), _some_method(_with_choices), "a method that chooses among widths", _found_methods, ("compare",)
    ),
    ReadOnlyWhere(
        ("scheme",), _some_method(lambda method, _: method.gains is not None),
        _methods_that(lambda method: method.gains), lambda values: f"--for {values['methods']}", ("calibrate",),
    ),
    ReadOnlyWhere(
        ("bits",), _measured_widths, "a method that measures widths",
        lambda values: f"--for {values['methods']}", ("calibrate",),
    ),
    ReadOnlyWhere(
        ("one_bit",), _one_bit, "--bits that have 1", lambda values: f"--bits {','.join(parts(values['bits']))}"
    ),
    ReadOnlyWhere(
        GPTQ, lambda values: QUANTIZERS[_quantizer(values)].tuned, f"--quantizer {' or '.join(tuned_names())}",
        lambda values: f"--quantizer {_quantizer(values)}",
    ),
    ReadOnlyWhere(
        ("sweeps",), lambda values: not values["static_groups"], "no --static-groups", lambda _: "--static-groups"
    ),
    ReadOnlyWhere((*GPTQ, "group_size"), lambda values: bool(_grid_widths(values)), "--scheme grid", _found_schemes),
    ReadOnlyWhere(("one_bit",), lambda values: 1 in _grid_widths(values), "--scheme grid", _found_schemes),
    ReadOnlyWhere(("zero_points",), _only_grids, "--scheme grid", _found_schemes),
    ReadOnlyWhere(
        ("damping", *(name for name in GPTQ if name != "compat")), lambda values: not values.get("compat"),
        "no --compat", lambda _: "--compat, which stands for it",
    ),
    ReadOnlyWhere(
        ("damping", "calibration", "min_tokens"), _calibrated, QUANTIZER,
        lambda values: f"--quantizer {_quantizer(values)}",
    ),
    ReadOnlyWhere(
        ("jobs",), lambda values: values["tasks"] is not None or _calibrated(values), f"{QUANTIZER}, or --tasks",
        lambda values: f"--quantizer {_quantizer(values)}", ("compare",),
    ),
    ReadOnlyWhere(
        ("linear_group_size", "linear_quantizer"), lambda values: values["linear_bits"] != "16", "--linear-bits 4 or 8",
        lambda values: f"--linear-bits {values['linear_bits']}",
    ),
    ReadOnlyWhere(
        ("context", "concurrency", "gpu_gib"), lambda values: values["dry_run"] or _for_a_gpu(values),
        f"--dry-run, or --preset {' or '.join(name for name, row in PRESETS.items() if row.service)},", _nothing,
    ),
    ReadOnlyWhere(("reference", "window", "max_tokens"), _is_given("data"), "--data FILE", _nothing, ("eval",)),
    ReadOnlyWhere(
        ("models", "requests", "at_a_time", "input_tokens", "output_tokens", "url", "as_json"),
        lambda values: values["gpu_report"] is None, "no --gpu-report",
        lambda values: f"--gpu-report {values['gpu_report']}", ("bench",),
    ),
    ReadOnlyWhere(
        ("limit", "backend"), lambda values: bool(values["tasks"] or values.get("suite")), "tasks", _nothing
    ),
)  # fmt: skip
"""The rows, in the order in which they are asked."""

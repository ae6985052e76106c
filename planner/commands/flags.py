"""The flags of the ``moeq`` command, shared by several of its subcommands, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.calibration.statistics import json_path
from planner.commands.completion import one_of
from planner.model.layout import Layout
from planner.model.sizes import average_for_budget
from planner.model.source import SourceModel
from planner.planning.method import Method
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions, check_choices, read_overrides, resolved_method
from planner.quantization.settings import QuantizeSettings, default_linear
from vllm_moeq.format import BIT_WIDTHS, CODES_PER_BLOCK, WHOLE_ROW, Linear, UsageError, read_json


class Promotion(StrEnum):
    """Visiting order of the promotion."""

    official = "official"
    stable = "stable"


class Counts(StrEnum):
    """Rule for the number of experts per width."""

    paper = "paper"
    official = "official"


class Ranking(StrEnum):
    """Which experts compete; by default what the method does."""

    layer = "layer"
    global_ = "global"


class QuantizerName(StrEnum):
    """Quantizer for two bits and more."""

    hqq = "hqq"
    rtn = "rtn"
    gptq = "gptq"


class ZeroPointsName(StrEnum):
    """Zero points of experts."""

    float = "float"
    integer = "integer"


class OneBit(StrEnum):
    """Quantizer for one bit."""

    sign = "sign"
    hqq = "hqq"
    rtn = "rtn"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub name (owner/name).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint written by moeq quantize.")]
AvgBits = Annotated[str | None, typer.Option("--avg-bits", metavar="B", help="Average bits per expert weight [2.5].")]
Bits = Annotated[
    str | None,
    typer.Option("--bits", metavar="LIST", help="Widths to choose from, of 1, 2, 3, 4, 8 [1,2,3; for kl 1,2,3,4]."),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        autocompletion=one_of(("auto", *METHODS)),
        help=f"auto (kl with a text or statistics, else the paper's router-norm-maxvar), {', '.join(METHODS)}.",
    ),
]
Zeta = Annotated[
    float, typer.Option("--zeta", help="Promote an expert whose MaxVar is more than this times another's.")
]
PromotionFlag = Annotated[Promotion, typer.Option("--promotion", help="Order among several promoted experts.")]
CountsFlag = Annotated[Counts, typer.Option("--counts", help="Experts per width: the paper's rule or its code's.")]
RankingFlag = Annotated[
    Ranking | None, typer.Option("--ranking", help="Experts compete within each layer, or all together [the method's].")
]
Initial = Annotated[
    Path | None,
    typer.Option("--initial-model", metavar="DIR", help="Model before training: rank by the change of norm."),
]
Stats = Annotated[
    Path | None, typer.Option("--stats", metavar="FILE", help="What moeq calibrate wrote, for methods that use it.")
]
Budget = Annotated[
    float | None,
    typer.Option("--budget-gib", metavar="GIB", help="Instead of --avg-bits: GiB that all weights may take."),
]
Overrides = Annotated[
    Path | None,
    typer.Option("--overrides", metavar="FILE", help='JSON of fixed widths: {"<experts prefix>.3": 3}.'),
]
Seed = Annotated[int, typer.Option("--seed", help="For --method random.")]
GroupSize = Annotated[
    int, typer.Option("--group-size", help="Expert weights per scale, a multiple of 32; -1 for whole rows.")
]
LinearBits = Annotated[
    int, typer.Option("--linear-bits", help="Width of attention and other linears: 4, 8 (GPU only) or 16.")
]
LinearGroup = Annotated[
    int | None,
    typer.Option("--linear-group-size", help="Weights per scale there [128, or what K / 4 is a multiple of]."),
]
ForQuantizer = Annotated[
    QuantizerName | None,
    typer.Option(
        "--quantizer", help="What will find the codes: some choices depend on it [gptq with --data, else hqq]."
    ),
]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Layers at a time, a process each [one per device].")]
Device = Annotated[
    str, typer.Option("--device", metavar="LIST", help="Where quantizers compute: cpu, cuda or cuda:0,cuda:1.")
]
OnRay = Annotated[bool, typer.Option("--ray", help="Layers on a Ray cluster (RAY_ADDRESS) with a shared file system.")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Continue an unfinished run, or delete it and start anew.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def linear_format(model: SourceModel, layout: Layout, bits: int, group: int | None) -> Linear:
    """Return the format of the linears that are not experts; raise UsageError for an impossible one."""
    if bits not in (4, 8, 16):
        raise UsageError(f"--linear-bits: expected 4, 8 or 16, the widths that vLLM's kernels serve, found {bits}")
    if group is None:
        return default_linear(model, layout, bits)
    if group < CODES_PER_BLOCK or group % CODES_PER_BLOCK:
        raise UsageError(f"--linear-group-size: expected a multiple of {CODES_PER_BLOCK}, found {group}")
    return Linear.model_validate({"bits": bits, "group_size": group})


def checked_group_size(value: int) -> int:
    """Return a group size that the format has; raise UsageError otherwise."""
    if value != WHOLE_ROW and (value < CODES_PER_BLOCK or value % CODES_PER_BLOCK):
        raise UsageError(f"--group-size: expected a multiple of {CODES_PER_BLOCK}, or -1, found {value}")
    return value


def checked_average(text: str) -> Fraction:
    """Return the exact decimal; out-of-range values are refused here, before they become huge integers."""
    low, high = min(BIT_WIDTHS), max(BIT_WIDTHS)
    try:
        if low <= float(text) <= high:
            return Fraction(text)
    except ValueError:
        pass
    raise UsageError(f"--avg-bits: expected a number between {low} and {high}, found {text!r}")


def read_choices(text: str, flag: str = "--bits") -> tuple[int, ...]:
    """Return the widths in a list such as 1,2,3, ascending.

    Raises:
        UsageError: not such a list, a width that the format does not have, or twice the same.
    """
    try:
        return check_choices([int(part) for part in text.split(",")], flag)
    except ValueError:
        raise UsageError(f"{flag}: expected widths such as 1,2,3, found {text!r}") from None


def planned_quantizer(name: QuantizerName | None, text: bool) -> str:
    """Return the quantizer of a plan: by default what ``moeq quantize`` would use with or without a text."""
    return (name or (QuantizerName.gptq if text else QuantizerName.hqq)).value


def _own_choices(flags: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the widths that a method chooses from, or those that its statistics have."""
    stats: Path | None = flags.get("stats")
    name = resolved_method(flags.get("method", "auto"), stats is not None or bool(flags.get("calibrated")))
    own = METHODS[name].choices if name in METHODS else Method().choices
    facts = read_json(json_path(stats)) if stats is not None and json_path(stats).is_file() else {}
    known = facts.get("widths") if isinstance(facts, dict) else None
    if not isinstance(known, list) or set(own) <= set(known) or name not in METHODS or not METHODS[name].measures:
        return own
    return check_choices(known, f"{stats}: widths") if known else own


def plan_options(
    model: SourceModel,
    layout: Layout,
    settings: QuantizeSettings,
    *,
    avg_bits: str | None,
    bits: str | None,
    budget_gib: float | None,
    overrides: Path | None,
    initial_model: Path | None,
    **rest: Any,
) -> PlanOptions:
    """Turn the plan flags into options.

    Raises:
        MoeqError: a flag that is no number, names no file, or excludes another.
    """
    choices = read_choices(bits) if bits is not None else _own_choices(rest)
    if avg_bits is not None and budget_gib is not None:
        raise UsageError("--avg-bits and --budget-gib: expected one of them, found both")
    if budget_gib is not None:
        average = average_for_budget(model, layout, budget_gib, choices, settings.group_size, settings.linear)
        if (row := METHODS.get(rest.get("method", ""))) is not None and row.one_width:
            average = Fraction(max(width for width in choices if width <= average))
    else:
        average = checked_average("2.5" if avg_bits is None else avg_bits)
    if initial_model is not None and not initial_model.is_dir():
        raise UsageError(f"--initial-model: {initial_model}: expected a folder, found none")
    return PlanOptions(
        avg_bits=average,
        bit_choices=choices,
        budget_gib=budget_gib,
        initial_model=initial_model,
        overrides=read_overrides(overrides, layout, choices) if overrides else {},
        **rest,
    )

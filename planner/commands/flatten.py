"""Commands whose flags come in groups: dataclasses in a function's signature, single flags for the shell."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum, StrEnum
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rich.markup import escape
from typer.models import OptionInfo, ParameterInfo

PANELS = {
    "Output": ("output", "as_json", "save", "png", "private", "revision", "format_", "zero_points"),
    "Plan": ("planning", "candidates", "plan", "methods", "bits", "seed", "quantizer"),
    "Calibration": ("text",),
    "Quantizer": ("codes", "scheme", "storage"),
    "GPTQ": ("gptq",),
    "Evaluation": ("predicted", "measured", "held_out"),
    "Tasks": ("asked",),
    "Requests": ("requests", "url", "gpu_report"),
    "Source": ("model",),
    "Machine": ("run", "device", "resume"),
    "Dry run": ("dry_run", "service"),
}
"""Panel of ``--help`` → parameters of commands, single flags or groups of them. Arguments have a panel of their own."""


@dataclass(frozen=True)
class OneOf:
    """Marks a flag of text that takes some names only: ``Annotated[str, typer.Option(...), OneOf(NAMES)]``.

    The names may come from a table, where an enum would repeat them. A flag whose type is a ``Literal`` needs no mark.
    """

    names: Iterable[str]


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command for typer whose flags are the function's parameters and the fields of its groups.

    A group is a parameter whose type is a dataclass with a flag in each field. In the command, its fields stand in its
    place; the function gets the dataclass, built from what was parsed.

    Raises:
        ValueError: two flags have one name.
    """
    groups: dict[str, type] = {}
    names: dict[str, list[str]] = {}
    flags: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = get_type_hints(function, include_extras=True)[name]
        if is_dataclass(annotation) and isinstance(annotation, type):
            members = _members(annotation, panel_of(name))
            groups[name], names[name] = annotation, [member.name for member in members]
            flags += members
        else:
            flags.append(_flag(name, annotation, parameter.default, panel_of(name)))
    if len({flag.name for flag in flags}) < len(flags):
        raise ValueError(f"{function.__name__}: two flags of one name among {[flag.name for flag in flags]}")

    def command(**values: Any) -> None:
        found = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
        built = {name: group(**{member: found.pop(member) for member in names[name]}) for name, group in groups.items()}
        function(**found, **built)

    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    command.__annotations__ = {flag.name: flag.annotation for flag in flags}
    command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    return command


def panel_of(parameter: str) -> str | None:
    """Return the panel of ``--help`` that shows a parameter of a command, or None where there is none for it."""
    return next((panel for panel, names in PANELS.items() if parameter in names), None)


def _members(group: type, panel: str | None) -> list[inspect.Parameter]:
    """Return the flags of a dataclass, in its order."""
    hints = get_type_hints(group, include_extras=True)
    return [
        _flag(
            field.name, hints[field.name], inspect.Parameter.empty if field.default is MISSING else field.default, panel
        )
        for field in fields(group)
    ]


def _flag(name: str, annotation: Any, default: Any, panel: str | None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=_shown(_for_typer(annotation), panel))


def _shown(annotation: Any, panel: str | None) -> Any:
    """Return the annotation with a panel, and with help that Rich prints as it is: [kl with …] is no markup of it."""
    if get_origin(annotation) is not Annotated:
        return annotation
    plain, *rest = get_args(annotation)
    return Annotated[plain, *(_shown_info(item, panel) if isinstance(item, ParameterInfo) else item for item in rest)]


def _shown_info(info: ParameterInfo, panel: str | None) -> ParameterInfo:
    """Return a copy of what typer knows of a flag: several commands share the original."""
    made = copy.copy(info)
    made.help = escape(info.help or "")
    if isinstance(info, OptionInfo):
        made.rich_help_panel = panel
    return made


def _for_typer(annotation: Any) -> Any:
    """Return the annotation with an enum as its type where :class:`OneOf` or a ``Literal`` names the choices."""
    if get_origin(annotation) is not Annotated:
        return annotation
    plain, *rest = get_args(annotation)
    optional = NoneType in get_args(plain)
    only = next(kind for kind in get_args(plain) if kind is not NoneType) if optional else plain
    names = [name for item in rest if isinstance(item, OneOf) for name in item.names]
    if get_origin(only) is Literal:
        names += get_args(only)
    if not names:
        return annotation
    make: Any = StrEnum  # mypy wants the names of an enum to be literals
    enum = make("Choice", [(name, name) for name in names])
    return Annotated[enum | None if optional else enum, *rest]

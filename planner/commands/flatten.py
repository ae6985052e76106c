"""Commands whose flags come in groups: dataclasses in a function's signature, single flags for the shell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum, StrEnum
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


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
            members = _members(annotation)
            groups[name], names[name] = annotation, [member.name for member in members]
            flags += members
        else:
            flags.append(_flag(name, annotation, parameter.default))
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


def _members(group: type) -> list[inspect.Parameter]:
    """Return the flags of a dataclass, in its order."""
    hints = get_type_hints(group, include_extras=True)
    return [
        _flag(field.name, hints[field.name], inspect.Parameter.empty if field.default is MISSING else field.default)
        for field in fields(group)
    ]


def _flag(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=_for_typer(annotation))


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

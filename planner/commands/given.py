"""What stood on the command line, as far as the parsed values do not say it any more."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""The base of the parser's errors, which is typer's own in some versions, and click's in others."""


def name_of(parameter: Any) -> str:
    """Return a parameter's name for people: its long flag, or the name of an argument."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name)
    return str(max(parameter.opts, key=len))


def given(command: TyperCommand, ctx: Any) -> dict[str, str]:
    """Return the parameters that stand on the command line: name → its name for people."""
    return {
        str(parameter.name): name_of(parameter)
        for parameter in command.params
        if getattr(ctx.get_parameter_source(parameter.name), "name", None) == "COMMANDLINE"
    }


def raw_values(command: TyperCommand, ctx: Any, args: list[str]) -> dict[str, str]:
    """Return parameter → its text, as it stands on the command line: a path that is read from '' is a folder.

    The arguments are parsed once more, so they must be those of a command line that could be parsed.
    """
    found, _, _ = command.make_parser(ctx).parse_args(args=list(args))
    return {name: value for name, value in found.items() if isinstance(value, str)}


def refuse_empty(command: TyperCommand, ctx: Any, args: list[str]) -> None:
    """Refuse empty values.

    Raises:
        UsageError: naming the flag.
    """
    values = raw_values(command, ctx, args)
    for parameter in command.params:
        if values.get(str(parameter.name)) == "":
            from vllm_moeq.format import UsageError  # brings torch, which the parser's own errors do without

            raise UsageError(f"{name_of(parameter)}: expected a value, found an empty one")

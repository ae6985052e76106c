"""Commands whose modules are imported when they are needed: torch takes a second, ``moeq --help`` does not."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from planner.commands.given import USAGE_ERROR, given, raw_values, refuse_empty
from planner.common.interrupts import interruptible
from planner.common.light import HEAVY, UNRUN, without
from planner.common.progress import Progress

LATE = ("params", "callback", "help")
"""The attributes of a command that its module knows."""


@dataclass(frozen=True)
class Row:
    """One command.

    Attributes:
        module: the module's name below ``planner.commands``.
        function: name of its function.
        summary: the first paragraph of the function's docstring.
        long: whether it works so long that it says at once that it has begun.
        tasks: whether it may run lm-eval's tasks, which need all of transformers' optional packages.
        looks: whether it looks at models' classes and files alone, and runs no model.
        behind: whose flags stand behind ``--``; an error about an unknown flag says so.
        settings: settings of the parser.
    """

    module: str
    function: str
    summary: str
    long: bool = False
    tasks: bool = False
    looks: bool = False
    behind: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


class LateCommand(TyperCommand):
    """A command that knows its name and its summary, and imports its module for everything else."""

    def __init__(self, name: str, row: Row) -> None:
        super().__init__(name, short_help=row.summary, context_settings=dict(row.settings))
        self.row = row
        for attribute in LATE:  # what is missing, __getattr__ loads
            delattr(self, attribute)

    def __getattr__(self, name: str) -> Any:
        """Load the attributes that only the module knows."""
        if name not in LATE:
            raise AttributeError(name)
        self._load()
        return vars(self)[name]

    def _complete(self, error: Any, ctx: Any, args: list[str]) -> None:
        """Add to an error of the parser what it leaves out: the command, the value that it found, or a flag's place."""
        if error.ctx is None:
            error.ctx = ctx
        error.message = error.message.removeprefix("Value error, ")
        if self.row.behind and hasattr(error, "option_name") and "--" not in args:
            error.message = f"{error.message}; {self.row.behind} flags stand behind --"
        parameter = getattr(error, "param", None)
        found = None if parameter is None else raw_values(self, ctx, args).get(parameter.name)
        if found is not None and repr(found) not in error.message:
            error.message = f"{error.message}, found {found!r}"

    def _load(self) -> None:
        # Both bring torch, so they are imported here.
        from planner.commands.flatten import flattened

        function = getattr(import_module(f"planner.commands.{self.row.module}"), self.row.function)
        made = typer.Typer(add_completion=False)
        made.command(self.name)(flattened(function))
        real = typer.main.get_command(made)
        self.params, self.callback, self.help = real.params, real.callback, escape(real.help or "")

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Say that a long command has begun, before its module is imported; then parse."""
        helps = not {"-h", "--help"}.isdisjoint(args)
        if self.row.long and "torch" not in sys.modules and not helps and not extra.get("resilient_parsing"):
            Progress().line(f"moeq {self.name}: loading torch")
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interruption ends with a line that says what is kept."""
        hidden = (*HEAVY, *UNRUN) if self.row.looks else HEAVY
        with interruptible(), nullcontext() if self.row.tasks else without(hidden):
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; refuse empty values, flags that would be ignored, and what lacks its packages.

        The parser's errors name a wrong value.

        Raises:
            UsageError: naming the flag.
        """
        before = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            self._complete(error, ctx, before)
            raise
        if not ctx.resilient_parsing:
            from planner.api.packages import require_packages
            from planner.api.unread import refuse_unread

            refuse_empty(self, ctx, before)
            values = {name: getattr(value, "value", value) for name, value in ctx.params.items()}
            refuse_unread(str(self.name), given(self, ctx), values)
            require_packages(str(self.name), values, Progress().line)
        return rest

"""Make docs/cli.md of the commands themselves: ``make cli`` writes it, ``test_cli_reference.py`` compares it.

python -m tests.docs.cli_reference
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer
from rich.text import Text

from planner.cli import EXIT_CODES, app
from planner.commands.flatten import PANELS
from tests.paths import ROOT

PAGE = ROOT / "docs" / "cli.md"
OTHERS = "Others"
"""The heading of flags that have no panel."""

INTRODUCTION = f"""# Commands

Written by `make cli` from what `moeq COMMAND --help` says. What a flag means at length, and how to choose, is in the
[guide](guide.md); words are in the [glossary](glossary.md).

- {EXIT_CODES}
- Every command has `-h` and `--help`. `moeq --version` prints the version; `moeq --install-completion` completes flags
  in your shell.
- Of a flag given twice the last one counts. A flag that would be ignored is refused.
- A `MODEL` is a folder or a name on the Hub (`owner/name`). A `DIR` is a folder that `moeq quantize` or `moeq import`
  wrote.
"""

DEFAULT_IN_HELP = re.compile(r"^(?P<meaning>.*) \[(?P<default>[^\[]+)\]\.$")
"""A default that is no value of the parser's, but worked out: ``Branch, made if there is none [main].``"""


def commands() -> dict[str, Any]:
    """Return name → the parser's command, in the order of ``moeq --help``."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def plain(text: str | None) -> str:
    """Return help without Rich's escapes."""
    return Text.from_markup(text or "").plain


def cell(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def value_of(parameter: Any) -> str:
    """Return what follows a flag: its choices, its placeholder, or nothing after a switch."""
    if getattr(parameter, "is_flag", False):
        return ""
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    return f"`{parameter.metavar or getattr(kind, '__name__', str(kind))}`"


def row(parameter: Any) -> str:
    """Return a flag's row: names, value, default, meaning."""
    meaning, default = plain(parameter.help), ""
    if parameter.required:
        default = "required"
    elif parameter.secondary_opts and parameter.default is not None:
        default = f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    elif parameter.default is not None and parameter.default is not False:
        default = f"`{getattr(parameter.default, 'value', parameter.default)}`"
    elif found := DEFAULT_IN_HELP.match(meaning):
        meaning, default = f"{found['meaning']}.", found["default"]
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return f"| {names} | {value_of(parameter)} | {cell(default)} | {cell(meaning)} |"


def panels(command: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the flags of each panel, in the order of ``--help``."""
    flags = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    for panel in (None, *PANELS):
        found = [flag for flag in flags if flag.rich_help_panel == panel and not flag.hidden]
        if found:
            yield panel or OTHERS, found


def section(name: str, command: Any) -> str:
    """Return a command's section: what it does, an example, arguments, and a table of flags per panel."""
    summary, example = plain(command.help).split("\n\nExample: ")
    lines = [f"## moeq {name}", "", " ".join(summary.split("\n\n")[0].split())]
    lines += [f"\n{' '.join(part.split())}" for part in summary.split("\n\n")[1:]]
    lines += ["", "```sh", " ".join(example.split()), "```", ""]
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    lines += [f"- `{argument.metavar}`: {cell(plain(argument.help))}" for argument in arguments]
    for panel, flags in panels(command):
        lines += ["", f"**{panel}**", "", "| flag | value | default | meaning |", "|---|---|---|---|"]
        lines += [row(flag) for flag in flags]
    return "\n".join(lines)


def page() -> str:
    """Return the whole page."""
    found = commands()
    table = ["| command | what it does |", "|---|---|"]
    table += [f"| [`{name}`](#moeq-{name}) | {cell(plain(command.short_help))} |" for name, command in found.items()]
    return (
        "\n\n".join(
            [INTRODUCTION.rstrip(), "\n".join(table), *(section(name, command) for name, command in found.items())]
        )
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")

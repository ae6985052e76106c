"""What every command says of itself."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import typer
from typer import rich_utils

from planner.cli import COMMANDS as ROWS
from planner.cli import EXIT_CODES, app

GROUP: Any = typer.main.get_command(app)
COMMANDS = GROUP.commands

WITHOUT_JSON = ("lm-eval", "serve")  # print another program's results or log
LONG = ("plan", "quantize", "calibrate", "compare", "eval", "export", "import", "push")
FRAME = re.compile(r"[│╭╮╰╯─]")


def words(text: str) -> str:
    """Return a text with single spaces and without frames."""
    return " ".join(FRAME.sub(" ", text).split())


def helps(width: int) -> dict[str, list[str]]:
    """Return the lines of every command's help on a terminal of some columns."""
    found: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rich_utils, "MAX_WIDTH", width)
        for name in ("", *COMMANDS):
            patch.setattr("sys.stdout", out := io.StringIO())
            app([*name.split(), "--help"], prog_name="moeq", standalone_mode=False)
            found[name] = out.getvalue().splitlines()
    return found


@pytest.fixture(scope="module")
def narrow() -> dict[str, list[str]]:
    """What a terminal of 80 columns shows."""
    return helps(80)


@pytest.fixture(scope="module")
def wide() -> dict[str, list[str]]:
    """What a terminal shows that has one line for each flag."""
    return helps(600)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    assert f"Example: moeq {name} " in (COMMANDS[name].help or "")


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_it_fits_a_terminal(narrow: dict[str, list[str]], name: str) -> None:
    assert max(map(len, narrow[name])) <= 80
    assert [line for line in narrow[name] if "…" in line] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_is_printed_as_it_is_written(wide: dict[str, list[str]], name: str) -> None:
    shown = [words(line) for line in wide[name]]
    for parameter in COMMANDS[name].params:
        begin = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.metavar
        source = parameter.help.replace("\\[", "[")  # what keeps Rich from taking it for markup
        lines = [line for line in shown if line.removeprefix("* ").startswith(f"{begin} ")]
        assert len(lines) == 1, begin
        assert f" {words(source)}" in lines[0], begin


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_what_a_flag_is(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.help.split()[0] not in ("Of", "What", "Whether", "For", "In"), parameter.help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_in_a_panel(name: str) -> None:
    options = [parameter for parameter in COMMANDS[name].params if parameter.param_type_name == "option"]
    assert [parameter.name for parameter in options if parameter.rich_help_panel is None] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_choices_are_shown(narrow: dict[str, list[str]], name: str) -> None:
    text = "".join(narrow[name])
    for parameter in COMMANDS[name].params:
        for choice in parameter.type_descriptor.choices or ():
            assert str(getattr(choice, "value", choice)) in text


@pytest.mark.parametrize("name", ["plan", "quantize", "calibrate"])
def test_the_example_has_a_text(name: str) -> None:
    assert " --data " in COMMANDS[name].help


def test_defaults_in_brackets_are_printed(narrow: dict[str, list[str]]) -> None:
    assert "[gptq with --data, else hqq]" in words("".join(narrow["quantize"]))
    assert "[the method's]" in "".join(narrow["plan"])


def test_all_commands_are_listed(narrow: dict[str, list[str]]) -> None:
    text = words(" ".join(narrow[""]))
    assert all(f"{name} {row.summary}" in text for name, row in ROWS.items())


def flags(name: str) -> set[str]:
    return {option for parameter in COMMANDS[name].params for option in parameter.opts}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in WITHOUT_JSON])
def test_results_come_as_json(name: str) -> None:
    assert "--json" in flags(name)


@pytest.mark.parametrize("name", LONG)
def test_work_is_estimated_before_it_starts(name: str) -> None:
    assert "--dry-run" in flags(name)


def test_exit_codes_are_documented() -> None:
    assert GROUP.epilog == EXIT_CODES

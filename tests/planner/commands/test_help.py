"""What every command says of itself."""

from __future__ import annotations

import click
import pytest
import typer

from planner.cli import app

GROUP = typer.main.get_command(app)
assert isinstance(GROUP, click.Group | typer.core.TyperGroup)
COMMANDS = GROUP.commands

WITHOUT_JSON = ("serve",)  # prints vLLM's log, and no result
LONG = ("plan", "quantize", "calibrate", "compare", "eval", "export", "import", "push")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    assert f"Example: moeq {name} " in (COMMANDS[name].help or "")


def flags(name: str) -> set[str]:
    return {option for parameter in COMMANDS[name].params for option in parameter.opts}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in WITHOUT_JSON])
def test_results_come_as_json(name: str) -> None:
    assert "--json" in flags(name)


@pytest.mark.parametrize("name", LONG)
def test_work_is_estimated_before_it_starts(name: str) -> None:
    assert "--dry-run" in flags(name)


def test_exit_codes_are_documented() -> None:
    assert "Exit status: 0 done; 2 a mistake in flags or files" in " ".join((GROUP.epilog or "").split())

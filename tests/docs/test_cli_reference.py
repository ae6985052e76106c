"""docs/cli.md says what the commands say."""

from __future__ import annotations

from typing import Any

import pytest

from planner.planning.methods import METHODS
from tests.docs.cli_reference import PAGE, commands, page

COMMANDS = commands()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/cli.md: `make cli` renews it"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_one_row(name: str) -> None:
    section = page().split(f"\n## moeq {name}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `-")]
    options: list[Any] = [parameter for parameter in COMMANDS[name].params if parameter.param_type_name == "option"]
    for option in options:
        assert sum(f"`{option.opts[-1]}`" in row.split(" | ")[0] for row in rows) == 1, option.opts
    assert len(rows) == len(options)


def test_defaults_and_choices_are_shown() -> None:
    text = page()
    assert "| `--act-order` | `none`, `group`, `full` | `group` |" in text
    assert "| `--avg-bits` | `B` | 2.5 | Average bits per expert weight. |" in text
    assert "| `--seed` | `int` | `0` |" in text
    assert "| `--resume`, `--no-resume` |  | `--resume` |" in text
    assert all(method in text for method in METHODS)

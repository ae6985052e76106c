"""Groups of flags become single flags, and groups again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from planner.commands.flatten import OneOf, flattened

COLOURS = {"red": 1, "blue": 2}


@dataclass(frozen=True)
class Paint:
    colour: Annotated[str, typer.Option("--colour", help="Of the wall."), OneOf(COLOURS)] = "red"
    second: Annotated[str | None, typer.Option("--second"), OneOf(COLOURS)] = None
    coats: Annotated[int, typer.Option("--coats", min=1)] = 1
    tool: Annotated[Literal["brush", "roller"] | None, typer.Option("--tool")] = None


@dataclass(frozen=True)
class MuchPaint(Paint):
    coats: Annotated[int, typer.Option("--coats", min=1)] = 3


Seen = list[tuple[str, Paint, bool]]


def runs(group: type[Paint], seen: Seen, *arguments: str) -> str:
    """Run a command with a group of flags; return what it prints."""

    def wall(name: Annotated[str, typer.Argument()], *, paint: Paint, dry: bool = False) -> None:
        """Paint a wall."""
        seen.append((name, paint, dry))

    wall.__annotations__ |= {"paint": group, "name": Annotated[str, typer.Argument()], "dry": bool}
    app = typer.Typer()
    app.command()(flattened(wall))
    return CliRunner().invoke(app, list(arguments)).output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), Paint()),
        (("--colour", "blue", "--second", "red", "--coats", "2", "--tool", "brush"), Paint("blue", "red", 2, "brush")),
    ],
)
def test_the_function_gets_the_group(arguments: tuple[str, ...], expected: Paint) -> None:
    seen: Seen = []
    runs(Paint, seen, "north", "--dry", *arguments)
    assert seen == [("north", expected, True)]
    assert type(seen[0][1].colour) is str


def test_a_subclass_has_another_default() -> None:
    seen: Seen = []
    runs(MuchPaint, seen, "north")
    assert seen[0][1] == MuchPaint(coats=3)


def test_choices_and_help_are_shown() -> None:
    shown = runs(Paint, [], "--help")
    assert "Paint a wall." in shown
    assert "red|blue" in shown
    assert "brush|roller" in shown
    assert "Of the wall." in shown


def test_other_names_are_refused() -> None:
    seen: Seen = []
    shown = runs(Paint, seen, "north", "--colour", "green")
    assert "'green'" in shown
    assert "'blue'" in shown
    assert seen == []


def test_two_flags_of_one_name_are_refused() -> None:
    def wall(paint: Paint, more: MuchPaint) -> None:
        """Paint a wall twice."""

    with pytest.raises(ValueError, match="wall: two flags of one name"):
        flattened(wall)

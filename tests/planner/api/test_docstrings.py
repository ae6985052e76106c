"""What help and the reference say of a function's arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import planner
from planner.api.docstrings import with_arguments

FUNCTIONS = (planner.plan, planner.quantize, planner.calibrate, planner.compare, planner.evaluate, planner.report)


@dataclass
class Base:
    """A base.

    Attributes:
        one: the first,
            on two lines.
        two: the second.

    Raises:
        ValueError: never.
    """


@dataclass
class Derived(Base):
    """A class.

    Attributes:
        two: another second.
    """


def test_attributes_become_arguments_before_errors() -> None:
    made = with_arguments("Do it.\n\n    Raises:\n        ValueError: never.\n    ", Derived, ["two", "one", "none"])
    assert made.splitlines() == [
        "Do it.", "", "Args:", "    two: another second.", "    one: the first, on two lines.", "", "Raises:",
        "    ValueError: never.",
    ]  # fmt: skip


def test_nothing_is_said_of_what_nobody_describes() -> None:
    assert with_arguments("Do it.", Derived, []) == "Do it."
    assert with_arguments(None, type("Bare", (), {"__doc__": None}), ["one"]) == ""


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_argument_is_described_once(function: Callable[..., Any]) -> None:
    _, _, section = str(inspect.getdoc(function)).partition("\nArgs:\n")
    described = re.findall(r"^    (\w+): ", section.split("\nRaises:\n")[0], re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_types_are_shown_without_bounds(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    assert "Annotated" not in str(signature)
    assert function.__annotations__["return"] is signature.return_annotation

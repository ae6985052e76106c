"""A flag means the same in every command, and shows what the tables hold."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import typer

from planner.api.keywords.tasks import SUITES
from planner.cli import app
from planner.commands.exchange import FORMATS
from planner.planning.methods import METHODS
from planner.quantization.quantizers.table import one_bit_names, quantizer_names
from vllm_moeq.format import BIT_WIDTHS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

DIFFERENT = {
    "--output": "a file, a folder or a page",
    "--dry-run": "what is printed instead of done",
    "--avg-bits": "compare takes a list",
    "--scheme": "compare takes a list",
    "--quantizer": "plan only asks what will be used; compare has a default",
    "--zero-points": "those of experts, or how another format stores them",
    "--data": "a text to calibrate on, or for eval one to predict",
    "--seq-len": "compare has a default",
    "--window": "compare has a default",
    "--max-tokens": "of the held-out text, or of the text to predict",
    "--tasks": "only eval refers to --suite's neighbours",
    "--linear-bits": "compare takes one width for all methods",
    "--jobs": "layers, or for compare models, at a time",
    "--concurrency": "of a dry run, or what bench sends",
    "--device": "eval runs a model, or has vLLM run it",
}
"""Flags that are not the same everywhere, and why."""


def flags(command: str) -> dict[str, Any]:
    """Return the parameters of a command by the last of their names."""
    return {parameter.opts[-1]: parameter for parameter in COMMANDS[command].params if parameter.opts[-1][0] == "-"}


def choices(parameter: Any) -> list[str]:
    """Return the names that a flag takes, as the parser knows them."""
    kind = getattr(parameter, "type_descriptor", None) or parameter.type  # typer's own parser, or click's
    return [str(getattr(name, "value", name)) for name in getattr(kind, "choices", None) or ()]


def looks(parameter: Any) -> tuple[Any, ...]:
    """Return what a flag is for its users."""
    return (parameter.opts, parameter.help, parameter.metavar, parameter.default, tuple(choices(parameter)))


def test_equal_names_mean_the_same() -> None:
    seen: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for command in COMMANDS:
        for flag, parameter in flags(command).items():
            seen[flag].add(tuple(map(str, looks(parameter))))
    assert {flag for flag, found in seen.items() if len(found) > 1} == set(DIFFERENT)


@pytest.mark.parametrize("command", ["plan", "quantize", "compare"])
def test_quantizers_come_from_the_table(command: str) -> None:
    assert choices(flags(command)["--quantizer"]) == quantizer_names()
    if command != "plan":
        assert choices(flags(command)["--one-bit"]) == one_bit_names()


@pytest.mark.parametrize("command", ["plan", "quantize", "compare", "calibrate"])
def test_widths_come_from_the_table(command: str) -> None:
    assert f"out of {', '.join(map(str, BIT_WIDTHS))} [" in flags(command)["--bits"].help


def test_other_choices_come_from_tables() -> None:
    assert choices(flags("export")["--format"]) == list(FORMATS)
    assert choices(flags("eval")["--suite"]) == list(SUITES)
    assert all(name in flags("plan")["--method"].help for name in METHODS)

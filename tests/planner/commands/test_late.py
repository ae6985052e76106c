"""Commands are imported when they are called, and tell the same before and after."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from planner.cli import COMMANDS
from tests.conftest import Outcome, one_line

QUICK: list[tuple[tuple[str, ...], dict[str, str]]] = [
    (("--help",), {}),
    (("--version",), {}),
    ((), {}),
    (("nonsense",), {}),
    ((), {"_MOEQ_COMPLETE": "complete_bash", "COMP_WORDS": "moeq qu", "COMP_CWORD": "1"}),
]
"""What is answered before any command is imported: arguments, and variables of the shell."""

AFTER = """
import atexit, sys
atexit.register(lambda: print([name for name in ("torch", "vllm", "transformers") if name in sys.modules]))
"""
"""Code that prints the heavy packages that a process has imported by its end."""


@pytest.mark.parametrize(("arguments", "variables"), QUICK)
def test_torch_is_not_imported(arguments: tuple[str, ...], variables: dict[str, str]) -> None:
    code = f"{AFTER}\nsys.argv = ['moeq', *{arguments!r}]\nfrom planner.cli import main\nmain()"
    made = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)
    assert made.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_no_command_imports_vllm() -> None:
    modules = sorted({f"planner.commands.{row.module}" for row in COMMANDS.values()})
    code = f"{AFTER}\nsys.modules['vllm'] = None\n" + "\n".join(f"import {name}" for name in modules)
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torch'" in made.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_is_the_docstring(name: str) -> None:
    row = COMMANDS[name]
    function = getattr(import_module(f"planner.commands.{row.module}"), row.function)
    first, _, _ = (inspect.getdoc(function) or "").partition("\n\n")
    assert row.summary == " ".join(first.split())


LONG = ("plan", "quantize", "calibrate", "compare", "eval", "export", "import")


def test_long_commands_say_that_they_have_begun() -> None:
    assert tuple(name for name, row in COMMANDS.items() if row.long) == tuple(name for name in COMMANDS if name in LONG)


@pytest.mark.slow
@pytest.mark.parametrize("answered", [True, False])
def test_the_first_line(moeq_process: Callable[..., Outcome], tiny_mixtral: Any, answered: bool) -> None:
    outcome = moeq_process("plan", tiny_mixtral if answered else "/none/such", "--json")
    assert outcome.err.splitlines()[0] == "moeq plan: loading torch"
    if answered:
        assert json.loads(outcome.out)["method"] == "router-norm-maxvar"
    else:
        one_line(outcome)


@pytest.mark.slow
def test_help_comes_without_the_first_line(moeq_process: Callable[..., Outcome]) -> None:
    outcome = moeq_process("plan", "-h")
    assert (outcome.code, outcome.err) == (0, "")

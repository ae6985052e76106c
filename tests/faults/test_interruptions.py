"""Ctrl-C and SIGTERM in the middle of a command: one line says what is kept, and the same command continues from it."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import run_here
from tests.faults.commands import COMMANDS, prepare, run
from tests.paths import MIXTRAL

pytestmark = pytest.mark.slow

SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def send(number: signal.Signals) -> Callable[[Path], None]:
    def fault(_: Path) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
        os.kill(os.getpid(), number)

    return fault


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a folder with everything that the commands read."""
    folder = tmp_path_factory.mktemp("interruptions")
    quantized = folder / "quantized"
    run_here("quantize", MIXTRAL, "--avg-bits", 2, "--bits", "1,2,3", "--quantizer", "rtn", "-o", quantized)
    return lambda name: prepare(folder / name, quantized)


def kept_paths(line: str, number: signal.Signals) -> list[str]:
    """Return what the line says is kept; a size follows each."""
    pattern = "; kept: (.+); the same command continues from .+; deleting .+ is safe"
    found = re.fullmatch(SIGNALS[number][1] + pattern, line)
    assert found, line
    parts = [re.fullmatch(r"(\S+) \([\d.]+ [KMG]?i?B\)", part) for part in found[1].split(" and ")]
    return [part[1] for part in parts if part]


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", COMMANDS)
def test_says_what_is_kept(prepared: Callable[[str], Path], name: str, number: signal.Signals) -> None:
    folder, command = prepared(f"{name}-{number.name}"), COMMANDS[name]
    later = dataclasses.replace(command, writes=command.writes + 2)  # every command has finished a part by then
    code, line = run(folder, later, send(number))
    assert code == SIGNALS[number][0]
    assert kept_paths(line, number) == [f"{command.result}.partial"]
    assert (folder / f"{command.result}.partial").is_dir()
    assert run(folder, command)[0] == 0
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", COMMANDS)
def test_keeps_nothing_of_no_use(prepared: Callable[[str], Path], name: str) -> None:
    folder = prepared(f"{name}-at-once")
    before = set(folder.iterdir())
    at_once = dataclasses.replace(COMMANDS[name], writes=1)
    assert run(folder, at_once, send(signal.SIGINT)) == (130, "interrupted; nothing is kept")
    assert set(folder.iterdir()) == before


def test_a_folder_that_would_be_deleted_is_not_called_the_next_start(prepared: Callable[[str], Path]) -> None:
    folder, command = prepared("anew"), COMMANDS["quantize"]
    anew = dataclasses.replace(command, arguments=(*command.arguments, "--no-resume"))
    assert "; the same command without --no-resume continues from it;" in run(folder, anew, send(signal.SIGINT))[1]

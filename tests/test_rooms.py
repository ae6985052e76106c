"""The rooms of docs/architecture.md: imports go downwards only, and each kind of code stands in its room."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

PLANNER = (
    "cli", "commands", "api", "estimates", "comparison", "reporting", "evaluation", "exchange", "planning",
    "calibration", "quantization", "plan_file", "model", "text", "output", "common", "sensitivity", "allocation",
)  # fmt: skip
"""From top to bottom: a room imports itself and those behind it."""

CALIBRATION = ("collect", "measures", "statistics", "block_score", "hessian_trace", "kl", "gptq", "reading")
QUANTIZATION = ("run", "runners", "layer_task", "rows", "packed", "record", "speculation", "settings", "quantizers")
PLUGIN = ("hf", "serving", "kernels", "completeness", "format")

STACKS = {
    "planner": PLANNER,
    "planner.calibration": CALIBRATION,
    "planner.quantization": QUANTIZATION,
    "vllm_moeq": PLUGIN,
}
"""Package → its rooms, from top to bottom."""

LOOSE_FILES = 5


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of every module below a package."""
    folder = ROOT / package.replace(".", "/")
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(source: str) -> set[str]:
    """Return the dotted names that a module imports anywhere in its code, `from a import b` as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path.read_text())}


def room(name: str, package: str) -> str | None:
    """Return the room of a package that a module is in, or None where it is in none."""
    inside = name.removeprefix(f"{package}.")
    return None if inside == name else inside.split(".")[0]


def upward(name: str, source: str, package: str, rooms: tuple[str, ...]) -> list[str]:
    """Return the imports of a module that go upwards in a package."""
    own = room(name, package)
    if own is None:
        return []
    targets = {target: room(target, package) for target in imported(source)}
    return sorted(
        f"{name} imports {target}"
        for target, other in targets.items()
        if other in rooms and rooms.index(other) < rooms.index(own)
    )


@pytest.mark.parametrize("package", STACKS)
def test_imports_go_downwards(package: str) -> None:
    found = [
        line for name, path in modules(package) for line in upward(name, path.read_text(), package, STACKS[package])
    ]
    assert not found


@pytest.mark.parametrize("package", STACKS)
def test_every_room_is_in_the_list(package: str) -> None:
    assert {room(name, package) for name, _ in modules(package)} - {None} <= set(STACKS[package])


def test_the_test_sees_an_upward_import() -> None:
    source = "def late() -> None:\n    from planner.reporting import card\n"
    assert upward("planner.model.source", source, "planner", PLANNER) == [
        "planner.model.source imports planner.reporting",
        "planner.model.source imports planner.reporting.card",
    ]
    assert upward("planner.commands.report", source, "planner", PLANNER) == []
    assert upward("planner.calibration.reading.text", "import planner.calibration.kl", *list(STACKS.items())[1])


def test_no_two_files_import_each_other() -> None:
    """Packages' own ``__init__`` files only pass names on; the files behind them count."""
    files = {name: path for package in ("planner", "vllm_moeq") for name, path in modules(package)}
    rooms = {name: path for name, path in files.items() if path.name != "__init__.py"}
    graph = {
        name: {it for it in imported(path.read_text()) if it in rooms and it != name} for name, path in rooms.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_plugin_does_not_import_the_planner() -> None:
    for name, path in modules("vllm_moeq"):
        assert not packages(path) & {"planner", "typer", "click", "rich"}, name


def test_the_planner_serves_nothing() -> None:
    """The planner runs without vLLM: it knows the format, and transformers' way of loading it."""
    for name, path in modules("planner"):
        assert not {it for it in imported(path.read_text()) if it.startswith(("vllm.", "vllm_moeq.serving"))}, name


def test_typer_stands_in_the_commands() -> None:
    users = [name for name, path in modules("planner") if packages(path) & {"typer", "click"}]
    assert [name for name in users if room(name, "planner") not in ("commands", "cli")] == []


def test_few_files_are_loose() -> None:
    assert len([path for path in (ROOT / "planner").glob("*.py") if path.name != "__init__.py"]) <= LOOSE_FILES

"""Faults in the middle of a run: what is on the disk afterwards is the old state, the finished one, or resumable.

The table in docs/security.md is what these tests see; MOEQ_WRITE_FAULTS=1 writes it anew.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.faults.commands import COMMANDS, FAULTS, Command, prepare, run, start
from tests.folders import contents
from tests.paths import MIXTRAL, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DOCS = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"
GOOD = {
    2: ("nothing (killed)", "exit 2: "),
    3: ("as before", "finished"),
    4: ("finishes, the same bytes", "not needed", "refused; delete"),
}
"""How cells of a row may begin, whatever the table says."""
HEADER = "| fault | command | it says | on the disk | the same command again |\n|---|---|---|---|---|\n"


def snapshot(path: Path) -> dict[str, bytes] | None:
    """Return what a result holds, without what differs from run to run."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return contents(path) if path.is_dir() else None


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "model").symlink_to(MIXTRAL)
    assert run(folder, COMMANDS["quantize"])[0] == 0
    return folder / "out"


@pytest.fixture(scope="module")
def expected(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes] | None]:
    """What each command writes when nothing happens."""
    found = {}
    for name, command in COMMANDS.items():
        folder = prepare(tmp_path_factory.mktemp("expected") / name, quantized)
        assert run(folder, command)[0] == 0
        found[name] = snapshot(folder / command.result)
        assert found[name]
    return found


def says(code: int, line: str) -> str:
    """Return how a run ended, without what depends on the machine."""
    if code < 0:
        return "nothing (killed)"
    for known in ("not enough memory", "File too large", "Input/output error", "another run is writing this output"):
        if known in line:
            return f"exit {code}: {known}".replace("File too large", "no space")
    if "expected it unchanged" in line:
        return f"exit {code}: changed while it was read"
    return f"exit {code}: {line}" if code else "done"


def disk(folder: Path, command: Command, expected: dict[str, bytes] | None) -> str:
    """Return what a run left."""
    if (folder / command.result).exists():
        return "finished" if snapshot(folder / command.result) == expected else "something else"
    partial = folder / f"{command.result}.partial"
    return "finished parts in `.partial`" if partial.exists() else "as before"


def again(folder: Path, command: Command, expected: dict[str, bytes] | None) -> str:
    if (folder / command.result).exists():
        return "not needed"
    code, line = run(folder, command)
    if code == 0:
        same = snapshot(folder / command.result) == expected
        return "finishes, the same bytes" if same else "finishes, from the new weights"
    return "refused; delete `.partial` to begin anew" if "with other" in line else f"exit {code}: {line}"


def one_fault(folder: Path, name: str, fault: str, expected: dict[str, bytes] | None) -> str:
    command = COMMANDS[name]
    quantized_before = contents(folder / "quantized")
    if fault == "second writer":
        with (folder / "log").open("wb") as log:
            first = start(folder, command, FAULTS[fault], log.fileno())
        while not (folder / "locked").exists() and first.is_alive():
            time.sleep(0.01)
        code, line = run(folder, command)
        assert f"{command.result}.partial" in line
        (folder / "other").touch()
        first.join()
        assert first.exitcode == 0
    else:
        code, line = run(folder, command, FAULTS[fault])
        assert code != 0
        assert "Traceback" not in line
    row = [fault, f"`{name}`", says(code, line), disk(folder, command, expected), again(folder, command, expected)]
    if fault != "source replaced" and name != "eval":
        assert contents(folder / "quantized") == quantized_before
    return f"| {' | '.join(row)} |\n"


def test_the_table(quantized: Path, expected: dict[str, dict[str, bytes] | None], tmp_path: Path) -> None:
    rows = [
        one_fault(prepare(tmp_path / f"{name}-{number}", quantized), name, fault, expected[name])
        for number, fault in enumerate(FAULTS)
        for name in COMMANDS
    ]
    for row in rows:
        cells = row.split(" | ")
        assert all(cells[number].startswith(good) for number, good in GOOD.items()), row
    table = HEADER + "".join(rows)
    print(table)
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    documented, _, after = rest.partition(END)
    if os.environ.get("MOEQ_WRITE_FAULTS"):
        DOCS.write_text(before + BEGIN + table + END + after)
    else:
        assert documented == table

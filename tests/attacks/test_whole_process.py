"""What a whole process of ``moeq verify`` takes on a damaged checkpoint: time, and memory besides the imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.cases import CORPUS
from tests.attacks.damages.attack import Attack

pytestmark = pytest.mark.slow

MOST_MIB, MOST_SECONDS = 40, 10.0
"""Beyond what the refusal of :data:`USUAL` takes: pages of libraries count too, 20 to 60 MiB by the machine's state."""

USUAL = next(attack for attack in CORPUS if attack.name == "another vocabulary")

LARGER = {
    "blanks in twelve headers": 46,  # a header of 24 MiB is in memory twice
    "a header of lists": 46,
}
"""Damages with bounds of their own."""


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    said = tmp_path_factory.mktemp("said") / "said.txt"
    command = [sys.executable, "-m", "tests.attacks.forked", str(said)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def taken(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    into, out = process.stdin, process.stdout
    assert into is not None
    assert out is not None
    into.write(f"{folder}\n")
    into.flush()
    found: dict[str, Any] = json.loads(out.readline())
    print(found)
    return found


@pytest.fixture(scope="module")
def usual(verifier: subprocess.Popen[str], quantized_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """MiB that a refusal takes which reads little: the least of three."""
    folder = tmp_path_factory.mktemp("usual") / "checkpoint"
    shutil.copytree(quantized_mixtral, folder)
    USUAL.change(folder)
    return min(int(taken(verifier, folder)["mib"]) for _ in range(3))


@pytest.mark.parametrize("attack", CORPUS, ids=lambda attack: attack.name)
def test_a_damaged_checkpoint(
    attack: Attack, request: pytest.FixtureRequest, tmp_path: Path, verifier: subprocess.Popen[str], usual: int
) -> None:
    folder = tmp_path / "damaged" / "checkpoint"
    shutil.copytree(request.getfixturevalue(attack.base), folder)
    attack.change(folder)
    found = taken(verifier, folder)
    shutil.rmtree(tmp_path / "damaged")
    assert found["code"] == 2, found
    assert found["said"].startswith("error: "), found
    assert found["mib"] - usual < LARGER.get(attack.name, MOST_MIB), (found, usual)
    assert found["seconds"] < MOST_SECONDS


def test_a_good_checkpoint(quantized_mixtral: Path, verifier: subprocess.Popen[str]) -> None:
    found = taken(verifier, quantized_mixtral)
    assert found["code"] == 0, found
    assert found["mib"] < 200, found  # transformers is imported

"""A few seconds of fuzzing, the same inputs every time; ``make fuzz`` runs ten minutes per target."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutators import MUTATORS
from tests.fuzz.targets import TARGETS, seeds
from tests.paths import ROOT

pytestmark = pytest.mark.slow

RUNS = {"schema": 3000, "headers": 600, "experts": 600, "unpack": 1500, "texts": 3000, "tokenizers": 300, "card": 1500}


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Change a few places: without atheris, nothing tells which changes reach new code."""
    content = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(content) + 1)
        kind = generator.randrange(4)
        if kind == 0:
            content[place : place + generator.randint(0, 16)] = b""
        elif kind == 1:
            content[place:place] = generator.choice(
                (b"{", b"[", b'"', b",", b":", b"1e999", b"-1", b"\x00", b"\xff", b"null")
            )
        elif kind == 2 and place < len(content):
            content[place] ^= 1 << generator.randrange(8)
        else:
            content[place:place] = content[place : place + generator.randint(1, 64)]
    return bytes(content)


@pytest.mark.parametrize("target", TARGETS)
def test_random_changes(target: str) -> None:
    generator = random.Random(target)
    inputs = seeds(target)
    for seed in inputs:
        TARGETS[target](seed)
    for _ in range(RUNS[target]):
        data = mutate(generator.choice(inputs), generator)
        if target in MUTATORS and generator.random() < 0.5:
            data = MUTATORS[target](data, generator)
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_guided_by_coverage(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.fuzz.run", target, f"-runs={RUNS[target]}", "-seed=1"]
    command.append(f"-artifact_prefix={tmp_path}/")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Done {RUNS[target]} runs" in result.stderr

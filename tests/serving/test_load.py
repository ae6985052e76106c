"""A short run of serving/load.py: clients that come, cancel and send nonsense do not change each other's answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving.load import run
from tests.serving.conftest import Pair
from tests.tiers import thorough

pytestmark = pytest.mark.slow


@pytest.mark.server
@pytest.mark.parametrize("seconds", thorough([8, 60], [8]))
def test_answers_under_load_are_those_of_an_idle_server(seconds: float, mixtral: Pair, tmp_path: Path) -> None:
    found = run(
        mixtral.quantized, (mixtral.source / "held_out.txt").read_text(encoding="utf-8"), 16, seconds, tmp_path / "log"
    )
    assert not found.unexpected
    assert not found.mismatches
    assert found.answers > 0
    assert found.cancelled > 0
    assert found.malformed > 0
    assert not found.left_processes

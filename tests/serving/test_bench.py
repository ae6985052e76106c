"""``moeq bench`` with the servers that it starts itself; ``test_server.py`` has it ask one that runs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from planner.evaluation.serving_speed import METRICS
from tests.conftest import Outcome
from tests.serving.conftest import Pair

pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.mark.server
def test_two_models_after_each_other(moeq: Callable[..., Outcome], mixtral: Pair) -> None:
    asked = ("--requests", 6, "--concurrency", 2, "--input-tokens", 32, "--output-tokens", 16, "--json")
    flags = ("--enforce-eager", "--max-model-len", 512)
    outcome = moeq("bench", mixtral.quantized, mixtral.source, *asked, "--", *flags)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [it["model"] for it in found["models"]] == [str(mixtral.quantized), str(mixtral.source)]
    ours, theirs = found["models"]
    assert all(it[name] > 0 for it in (ours, theirs) for name in METRICS)
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    assert found["first_better_by"]["tokens_per_second"] == pytest.approx(ratio)
    assert outcome.err.count("starting vLLM") == 2

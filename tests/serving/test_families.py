"""Models that no row names, served by vLLM: greedy tokens equal transformers' of the dense export."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.coverage import quantize
from benchmarks.greedy import SAME, compare
from benchmarks.models.families import build

pytestmark = pytest.mark.slow

REST = ["hunyuan_v1_moe", "afmoe", "mellum", "cohere2_moe"]


def check(name: str, work: Path) -> None:
    build(name, work / "model")
    quantize(work / "model", work / "quantized", [])
    assert compare(name, work / "quantized", work / "dense") == SAME


@pytest.mark.server
@pytest.mark.parametrize("name", ["granitemoehybrid", "hy_v3"])
def test_tokens_are_transformers(name: str, tmp_path: Path) -> None:
    """One has Mamba layers, of which one linear stays in 16 bits; the other has a shared expert and sigmoids."""
    check(name, tmp_path)


@pytest.mark.server
@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_tokens_of_other_families_are_transformers(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)

"""Models that no row names, served by vLLM: greedy tokens equal transformers' of the dense export."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.coverage import quantize
from benchmarks.greedy import AS_DENSE, SAME, compare, declare_operators
from benchmarks.models.families import build

pytestmark = pytest.mark.slow

REST = ["hunyuan_v1_moe", "afmoe", "laguna", "mellum", "cohere2_moe"]
SEEING = ["qwen3_vl_moe", "qwen3_vl_moe-exchanged", "glm4v_moe"]


def check(name: str, work: Path, tokens: str = SAME) -> None:
    build(name, work / "model")
    quantize(work / "model", work / "quantized", [])
    assert compare(name, work / "quantized", work / "dense") == tokens


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


@pytest.mark.server
@pytest.mark.full
@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's classes for images import torchvision")
@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_images_answers_texts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # declaring adds to it
    declare_operators()
    check(name, tmp_path)


@pytest.mark.server
@pytest.mark.full
def test_tokens_of_kimi_k25_are_those_of_its_dense_export(tmp_path: Path) -> None:
    """As of other models with latent attention, transformers' own tokens are not vLLM's."""
    check("kimi_k25", tmp_path, AS_DENSE)

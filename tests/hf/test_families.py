"""Families with other activations than silu(gate)·up: their quantized experts are those of the dense export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import vllm_moeq.hf  # noqa: F401  (registers the method)
from benchmarks.models.families import build
from planner.common.progress import Progress
from planner.exchange.dense import export_dense
from tests.by_hand import quantize_by_hand
from tests.hf.conftest import logits
from vllm_moeq.hf import RoutedExperts
from vllm_moeq.kernels import Activation

pytestmark = [pytest.mark.slow, pytest.mark.compiler]

WIDTHS = (2, 3, 8, 4, 2, 3, 8, 4)
FAMILIES = {
    "gemma4": Activation("gelu_tanh"),
    "nemotron_h": Activation("relu2", gated=False),
    "minimax_m3_vl": Activation(alpha=1.702, limit=7.0, beta=1.0),
    "deepseek_v4": Activation(limit=10.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_logits_are_those_of_the_dense_export(name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "source")
    quantized = quantize_by_hand(
        tmp_path / "source", tmp_path / "quantized", lambda _: WIDTHS, quantizer="rtn", linear_bits=16
    )
    export_dense(quantized, tmp_path / "dense", Progress(quiet=True), torch.float32)
    kind = transformers.AutoModelForCausalLM
    if name in ("gemma4", "minimax_m3_vl"):
        kind = transformers.AutoModelForImageTextToText
    packed, dense = (kind.from_pretrained(folder, dtype=torch.float32) for folder in (quantized, tmp_path / "dense"))
    modules = [module for module in packed.modules() if isinstance(module, RoutedExperts)]
    assert modules
    assert {module.known for module in modules} == {FAMILIES[name]}
    found, expected = logits(packed), logits(dense)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

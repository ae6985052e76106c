"""Checkpoints with trellis codes in a rotated basis, beside grids: as their dense exports, in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hf.conftest import Pair, logits, shipped_pair
from tests.paths import SHIPPED
from tests.shipped import sizes_of
from vllm_moeq.format import load_config, verify
from vllm_moeq.hf.experts import RoutedExperts
from vllm_moeq.kernels import VARIABLE

pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module", params=SHIPPED)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Trellises in a rotated basis; the experts of 8 bits are grids."""
    return shipped_pair(request.param, tmp_path_factory.mktemp("trellis"), scheme="trellis")


def test_the_checkpoint_has_both_schemes(mixed: Pair) -> None:
    config = load_config(mixed.quantized)
    assert config.format_version == 2
    assert config.rotation is not None
    assert {name for names in (config.schemes or {}).values() for name in names} == {"grid", "trellis"}
    assert verify(mixed.quantized).layers == len(config.experts)


def difference(packed: Any, dense: Any) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    expected = logits(dense)
    return float((logits(packed) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_logits_are_the_dense_exports(mixed: Pair, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, backend)
    packed = mixed.kind.from_pretrained(mixed.quantized, dtype=torch.float32)
    assert difference(packed, mixed.load("dense", torch.float32)) < 2e-5
    assert {module._backend.name for module in packed.modules() if isinstance(module, RoutedExperts)} == {backend}


def test_the_fused_kernel(mixed: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Triton's interpreter without a GPU."""
    found = []
    torch.manual_seed(0)
    hidden = sizes_of(mixed.quantized).hidden
    x, ids, weights = torch.randn(2, hidden).half(), torch.tensor([[3, 0], [1, 2]]), torch.rand(2, 2)
    for backend in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        packed = mixed.kind.from_pretrained(mixed.quantized, dtype=torch.float16)
        module = next(it for it in packed.modules() if isinstance(it, RoutedExperts))
        found.append(module(x, ids, weights).float())
        assert module._backend.name == backend
    assert (found[1] - found[0]).norm() < 0.002 * found[0].norm()


def test_experts_that_no_kernel_takes_are_rotated_too(mixed: Pair) -> None:
    packed = mixed.kind.from_pretrained(mixed.quantized, dtype=torch.float32)
    for module in packed.modules():
        if isinstance(module, RoutedExperts):
            module.fused = False
    assert difference(packed, mixed.load("dense", torch.float32)) < 2e-5

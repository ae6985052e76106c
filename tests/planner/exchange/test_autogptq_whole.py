"""GPTQ checkpoints that are not whole, or hold values that no model has: refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.exchange.autogptq.layout import SUFFIXES
from tests.conftest import one_line
from vllm_moeq.completeness import verify_whole

Moeq = Callable[..., Any]
Change = Callable[..., Any]
Edit = Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | None

BESIDE = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.1.gate_proj"

TENSORS: dict[str, tuple[str, Edit, str]] = {
    "no norm": ("model.norm.weight", None, "tensor model.norm.weight is missing: expected [64]"),
    "no head": ("lm_head.weight", None, "tensor lm_head.weight is missing: expected [256, 64]"),
    "no embeddings": ("model.embed_tokens.weight", None, "tensor model.embed_tokens.weight is missing"),
    "no router": ("model.layers.1.mlp.gate.weight", None, "gate.weight is missing: expected [8, 64]"),
    "a short norm": ("model.norm.weight", torch.ones(32).bfloat16(), "model.norm.weight: expected [64]"),
    "a norm of integers": ("model.norm.weight", torch.ones(64).int(), "model.norm.weight: expected floats"),
    "a narrow router": (
        "model.layers.1.mlp.gate.weight", torch.ones(8, 32).bfloat16(), "layers.1.mlp.gate.weight: expected [8, 64]"
    ),
    "NaN in a norm": (
        "model.norm.weight", lambda norm: norm * float("nan"), "model.norm.weight: expected finite values, found NaN"
    ),
    "a huge norm": (
        "model.norm.weight", torch.full((64,), 1e300, dtype=torch.float64),
        "model.norm.weight: expected values up to 65504"
    ),
    "a norm in eight bits": (
        "model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn), "expected floats of 16 bits or more"
    ),
    "a layer too much": (
        "model.layers.9.x.weight", torch.ones(4), "model.layers.9.x.weight: expected no such tensor"
    ),
    "a bias": (f"{QUERY}.bias", torch.zeros(64).bfloat16(), f"{QUERY}.bias: expected no such tensor"),
    "a huge scale": (
        f"{EXPERT}.scales", lambda scales: torch.full_like(scales, 3e38, dtype=torch.bfloat16),
        f"{EXPERT}.scales: expected values up to 65504"
    ),
    "a huge scale of a linear": (
        f"{QUERY}.scales", lambda scales: torch.full_like(scales, 3e38, dtype=torch.bfloat16),
        f"{QUERY}.scales: expected values up to 65504"
    ),
}  # fmt: skip

NEW = ("model.layers.9.x.weight", f"{QUERY}.bias")
"""Tensors that the checkpoint does not have."""

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer too few": ({"num_hidden_layers": 1}, "model.layers.1."),
    "a layer too many": ({"num_hidden_layers": 3}, "model.layers.2."),
    "another vocabulary": ({"vocab_size": 5}, "expected [5, 64]"),
    "more experts per token than experts": ({"num_experts_per_tok": 99}, "num_experts_per_tok: expected 1 to 8"),
}


@pytest.fixture
def refused(moeq: Moeq, tmp_path: Path) -> Callable[[Path], str]:
    """Return a function that imports a wrong checkpoint, checks that nothing is written, and returns the error."""

    def run(folder: Path) -> str:
        message = one_line(moeq("import", folder, "-o", tmp_path / "out"))
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        return message

    return run


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_is_missing_wrong_or_too_much(
    refused: Callable[[Path], str], gptq_copy: Path, change_tensor: Change, case: str
) -> None:
    name, edit, message = TENSORS[case]
    change_tensor(gptq_copy, name, edit, BESIDE if name in NEW else None)
    assert message in refused(gptq_copy)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_another_model(
    refused: Callable[[Path], str], gptq_copy: Path, change_config: Change, case: str
) -> None:
    changes, message = CONFIGS[case]
    change_config(gptq_copy, lambda config: config.update(changes))
    assert message in refused(gptq_copy)


def test_a_linear_that_is_missing(refused: Callable[[Path], str], gptq_copy: Path, change_tensor: Change) -> None:
    for suffix in SUFFIXES:
        change_tensor(gptq_copy, f"{QUERY}.{suffix}", None)
    assert f"tensor {QUERY}.weight is missing: expected [64, 64]" in refused(gptq_copy)


def test_values_that_only_dequantizing_shows(
    refused: Callable[[Path], str], gptq_copy: Path, change_tensor: Change
) -> None:
    """The scale alone is small enough."""
    change_tensor(gptq_copy, f"{QUERY}.scales", lambda scales: torch.full_like(scales, 60000))
    change_tensor(gptq_copy, f"{QUERY}.qzeros", torch.Tensor.zero_)  # not symmetric, so that it is dequantized
    assert f"{QUERY}.qweight, dequantized: expected values up to 65504" in refused(gptq_copy)


def test_a_companion_that_is_damaged(refused: Callable[[Path], str], gptq_copy: Path) -> None:
    (gptq_copy / "generation_config.json").write_text("{")
    assert "generation_config.json: not valid JSON" in refused(gptq_copy)


def test_what_other_tools_leave_is_taken(moeq: Moeq, gptq_copy: Path, change_tensor: Change, tmp_path: Path) -> None:
    """Frequencies follow from the config."""
    change_tensor(gptq_copy, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8), BESIDE)
    outcome = moeq("import", gptq_copy, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    verify_whole(tmp_path / "out")

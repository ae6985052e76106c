"""A model whose experts compute what no kernel does: commands that run it say so in one line, and write nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.by_hand import quantize_by_hand
from tests.conftest import Outcome, one_line
from tests.paths import CALIBRATION_TEXT, MIXTRAL

pytestmark = pytest.mark.slow

TEXT = MIXTRAL / "held_out.txt"
READ = ("--samples", 2, "--seq-len", 32)


@pytest.fixture
def gelu(tmp_path: Path, change_config: Callable[..., None]) -> Path:
    folder = shutil.copytree(MIXTRAL, tmp_path / "gelu")
    change_config(folder, lambda config: config.update(hidden_act="gelu"))
    return folder


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("eval", ("--data", TEXT, "--max-tokens", 64)),
        ("compare", ("--held-out", TEXT, "--avg-bits", 2, "--methods", "uniform", "-o")),
        ("calibrate", ("--data", CALIBRATION_TEXT, *READ, "-o")),
        ("plan", ("--data", CALIBRATION_TEXT, *READ, "--avg-bits", 2, "-o")),
        ("quantize", ("--data", CALIBRATION_TEXT, *READ, "--avg-bits", 2, "-o")),
    ],
)
def test_another_activation(
    moeq: Callable[..., Outcome], gelu: Path, tmp_path: Path, command: str, flags: tuple[Any, ...]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    outcome = moeq(command, gelu, *flags, *([tmp_path / "out"] if flags[-1] == "-o" else []))
    message = one_line(
        outcome, "note: vLLM cannot serve it: transformers' MixtralExperts.act_fn: expected silu or gelu_tanh or relu2"
    )
    assert message == (
        f"error: {gelu}: model.layers.0.block_sparse_moe.experts: "
        "transformers' MixtralExperts.act_fn: expected silu or gelu_tanh or relu2, found GELUActivation"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_another_activation_in_a_checkpoint_and_its_reference(
    moeq: Callable[..., Outcome], gelu: Path, tmp_path: Path
) -> None:
    quantized = quantize_by_hand(gelu, tmp_path / "quantized", lambda layer: [2] * layer.num_experts, quantizer="rtn")
    read = ("--data", TEXT, "--max-tokens", 64)
    for arguments in ((quantized, *read), (MIXTRAL, *read, "--reference", gelu)):
        assert "MixtralExperts.act_fn: expected silu or gelu_tanh or relu2, found GELUActivation" in one_line(
            moeq("eval", *arguments)
        )
    assert not (quantized / "evaluation.json").exists()

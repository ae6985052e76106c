"""Tiny checkpoints of families without a row: quantized and verified like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.coverage import calibrate, quantize
from benchmarks.models.families import FAMILIES, build
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from tests.tiers import thorough
from vllm_moeq.format import UsageError, load_config, verify

pytestmark = pytest.mark.slow

EVERY_RUN = ("qwen3_vl_moe-exchanged", "kimi_k25", "nemotron_h", "jamba")
READ = [name for name in FAMILIES if name != "longcat_flash"]


@pytest.mark.parametrize("name", thorough(READ, EVERY_RUN))
def test_a_family_is_quantized_and_verified(name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "model")
    said: list[str] = []
    assert quantize(tmp_path / "model", tmp_path / "out", said) == "yes"
    assert verify(tmp_path / "out").experts == sum(map(len, load_config(tmp_path / "out").experts.values()))
    how = [line for line in said if "has no row of its own and was recognized by transformers'" in line]
    assert len(how) == 1
    assert how[0].startswith(f"note: {name.split('-')[0]} ")


CALIBRATED = [name for name in READ if name != "deepseek_v4"]
EVERY_FORM = (
    "qwen3_vl_moe-exchanged", "glm_moe_dsa", "granitemoehybrid", "kimi_linear", "gemma4", "nemotron_h", "minimax_m3_vl"
)  # fmt: skip
"""A part that sees images; layers that return two things; no rotary embedding, Mamba; parts joined to one tensor;
experts with GELU, without a gate, with a clamp."""


@pytest.mark.parametrize("name", thorough(CALIBRATED, EVERY_FORM))
def test_a_family_is_calibrated(name: str, tmp_path: Path) -> None:
    """Its logits layer by layer are transformers', and it is quantized with a text by the default method."""
    build(name, tmp_path / "model")
    assert calibrate(name, tmp_path / "model", tmp_path) == "yes"


def test_what_cannot_be_read_layer_by_layer_is_refused_in_one_line(tmp_path: Path) -> None:
    """DeepSeek-V4 mixes several streams of hidden states behind its last layer."""
    build("deepseek_v4", tmp_path / "model")
    with pytest.raises(UsageError) as error:
        calibrate("deepseek_v4", tmp_path / "model", tmp_path)
    start = f"{tmp_path / 'model'}: deepseek_v4 cannot be calibrated: transformers' DeepseekV4ForCausalLM: expected "
    assert str(error.value).startswith(start)
    assert "\n" not in str(error.value)


def test_fused_experts_are_the_same_in_either_orientation(tmp_path: Path) -> None:
    found = []
    for name in ("qwen3_vl_moe", "qwen3_vl_moe-exchanged"):
        build(name, tmp_path / name)
        with SourceModel(tmp_path / name) as model:
            layers = read_layout(model).layers
            found.append([model.shards.load(layers[0].weight(3, it)) for it in layers[0].projections.names()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_linear_whose_inputs_are_no_whole_blocks_stays_in_16_bits(tmp_path: Path) -> None:
    build("jamba", tmp_path / "model")
    name = "model.layers.0.mamba.dt_proj.weight"
    with SourceModel(tmp_path / "model") as model:
        layout = read_layout(model)
    assert layout.odd == (name,)
    assert name not in layout.linears
    said: list[str] = []
    quantize(tmp_path / "model", tmp_path / "out", said)
    note = "note: linears whose input dimension 32 does not divide stay in 16 bits: 1, the first"
    assert f"{note} {name} [256, 8]" in said
    assert name.removesuffix(".weight") in load_config(tmp_path / "out").unquantized


@pytest.mark.parametrize(("name", "dense"), [("jamba", ["in_proj", "out_proj"]), ("granitemoehybrid", [])])
def test_linears_that_vllm_takes_dense_alone_stay_in_16_bits(name: str, dense: list[str], tmp_path: Path) -> None:
    """Those of a Mamba 1 block; those of Mamba 2 blocks are packed, if their sizes fit."""
    build(name, tmp_path / "model")
    with SourceModel(tmp_path / "model") as model:
        layout = read_layout(model)
    assert list(layout.dense) == [f"model.layers.0.mamba.{it}.weight" for it in dense]
    assert not set(layout.dense) & set(layout.linears)
    assert set(layout.dense) <= set(layout.plain)
    assert ("model.layers.0.mamba.out_proj.weight" in layout.linears) == (not dense)
    said: list[str] = []
    quantize(tmp_path / "model", tmp_path / "out", said)
    notes = [line for line in said if line.startswith("note: linears of Mamba blocks stay in 16 bits")]
    assert len(notes) == bool(dense)

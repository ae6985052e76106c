"""A source has every tensor of its architecture, under published names or transformers' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.model.whole import check_whole
from tests.architectures import TINY, build
from tests.conftest import one_line, save_mixtral
from tests.folders import edit_tensors, save_byte_tokenizer
from tests.paths import CALIBRATION_TEXT
from vllm_moeq.format import CheckpointError, MoeqError

Moeq = Callable[..., Any]

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"

PLAIN = [name for name, tiny in TINY.items() if tiny.convert is None]


def check(folder: Path) -> str | None:
    with SourceModel(folder) as model:
        return check_whole(model, read_layout(model))


@pytest.mark.slow
class TestEveryArchitecture:
    @pytest.mark.parametrize("name", TINY)
    def test_is_whole_and_misses_a_tensor(self, tmp_path: Path, name: str) -> None:
        build(name, tmp_path)
        assert check(tmp_path) is None
        kept = [name for name in load_file(tmp_path / "model.safetensors") if "norm" in name]
        edit_tensors(tmp_path, lambda tensors: tensors.pop(kept[-1]))
        with pytest.raises(CheckpointError, match=rf"tensor {kept[-1]} is missing: expected \["):
            check(tmp_path)

    @pytest.mark.parametrize("name", PLAIN)
    def test_of_transformers_own_layout_is_the_same_model(self, tmp_path: Path, name: str) -> None:
        """``save_original_format=False``: other names, and all experts of a layer in one tensor."""
        build(name, tmp_path / "published").save_pretrained(tmp_path / "own", save_original_format=False)
        assert check(tmp_path / "own") is None
        with SourceModel(tmp_path / "published") as model, SourceModel(tmp_path / "own") as own:
            assert read_layout(own) == read_layout(model)
            assert set(own.shards.tensors) == set(model.shards.tensors)
            for tensor in model.shards.tensors:
                assert torch.equal(own.shards.load(tensor), model.shards.load(tensor)), tensor


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    build("mixtral", tmp_path / "published").save_pretrained(folder, save_original_format=False)
    router = "model.layers.0.mlp.gate.weight"
    other = "model.layers.0.block_sparse_moe.gate.weight"
    edit_tensors(folder, lambda tensors: tensors.update({other: tensors[router].clone()}))
    with pytest.raises(MoeqError, match=r"gate\.weight: expected one of it and .*gate\.weight"):
        SourceModel(folder)


COMMANDS: dict[str, tuple[object, ...]] = {
    "plan": ("--avg-bits", 3),
    "quantize": ("--avg-bits", 3, "--quantizer", "rtn", "-o", "out"),
    "calibrate": ("--data", "text", "-o", "stats.safetensors"),
    "compare": ("--data", "text", "--held-out", "text", "-o", "out"),
}


@pytest.mark.parametrize("gone", ["model.norm.weight", "lm_head.weight", "model.layers.1."])
def test_quantize_refuses(moeq: Moeq, tmp_path: Path, gone: str) -> None:
    folder = save_mixtral(tmp_path / "model")
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(gone)])
    outcome = moeq("quantize", folder, "--avg-bits", 3, "--quantizer", "rtn", "-o", tmp_path / "out")
    assert f"tensor {gone}" in one_line(outcome)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_works_on_a_source_refuses(moeq: Moeq, tmp_path: Path, command: str) -> None:
    folder = save_mixtral(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}))
    (tmp_path / "text").write_text("a text")
    flags = [tmp_path / flag if flag in ("text", "out", "stats.safetensors") else flag for flag in COMMANDS[command]]
    message = one_line(moeq(command, folder, *flags))
    assert "tensor model.norm.weight: expected [64], as in transformers' MixtralForCausalLM, found [8]" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama4_text", "mixtral"])
def test_eval_refuses_a_model_and_a_reference(moeq: Moeq, tmp_path: Path, name: str) -> None:
    """Also one that transformers loads whole, which would make up what is missing."""
    build(name, tmp_path / "whole")
    build(name, tmp_path / "part")
    edit_tensors(tmp_path / "part", lambda tensors: tensors.pop("model.norm.weight"))
    (tmp_path / "text").write_text("import os\n" * 20)
    for flags in (("part",), ("whole", "--reference", tmp_path / "part")):
        model, *more = flags
        message = one_line(moeq("eval", tmp_path / str(model), "--data", tmp_path / "text", *more))
        assert "part: tensor model.norm.weight is missing" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected 1 to 8 experts per token, found 9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: expected 1 to 8 experts per token, found 0"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok: expected 1 to 8 experts per token, found None"),
        ({"moe_topk": [2, 9]}, "moe_topk: expected 1 to 8 experts per token, found [2, 9]"),
        ({"top_k_experts": 9}, "top_k_experts: expected 1 to 8 experts per token, found 9"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1."),
    ],
)
def test_a_config_of_another_model_is_refused(moeq: Moeq, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = save_mixtral(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    outcome = moeq(
        "quantize", folder, "--avg-bits", 3, "--quantizer", "rtn", "--group-size", 32, "-o", tmp_path / "out"
    )
    assert words in outcome.err
    assert outcome.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.norm.weight", torch.full((64,), float("nan"), dtype=torch.bfloat16), "expected finite values"),
        ("model.norm.weight", torch.full((64,), 1e300, dtype=torch.float64), "expected values up to 65504"),
        ("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn), "expected floats of 16 bits or more"),
        (Q_PROJ, torch.ones(64, 64).to(torch.float8_e4m3fn), "expected floats of 16 bits or more"),
        (Q_PROJ, torch.full((64, 64), 3e38), "expected weights up to 16384, found 3e+38"),
        (EXPERT, torch.ones(128, 64).to(torch.float8_e4m3fn), "expected floats of 16 bits or more"),
        (EXPERT, torch.full((128, 64), 1e6), "expected weights up to 16384, found 1e+06"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int64), "expected floats"),
        ("lm_head.weight", torch.full((256, 64), float("inf"), dtype=torch.bfloat16), "expected finite values"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    moeq: Moeq, tmp_path: Path, name: str, value: torch.Tensor, words: str
) -> None:
    folder = save_mixtral(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({name: value}))
    outcome = moeq(
        "quantize", folder, "--avg-bits", 3, "--quantizer", "rtn", "--group-size", 32, "-o", tmp_path / "out"
    )
    assert f"tensor {name}: {words}" in outcome.err.splitlines()[-1]
    assert outcome.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_weight_that_is_no_number_is_named_with_a_text(moeq: Moeq, tmp_path: Path, name: str) -> None:
    folder = save_mixtral(tmp_path / "model")
    save_byte_tokenizer(folder)
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(math.nan))
    outcome = moeq(
        "quantize", folder, "--avg-bits", 2, "--data", CALIBRATION_TEXT, "--samples", 4, "--seq-len", 32,
        "--group-size", 32, "-o", tmp_path / "out",
    )  # fmt: skip
    assert f"{name}: expected finite values, found NaN or infinity" in outcome.err
    assert outcome.code == 2

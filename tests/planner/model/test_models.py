from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.model.layout import Layout, read_layout
from planner.model.source import SourceModel
from vllm_moeq.format import CheckpointError, ConfigError, MoeqError, UsageError

MIXTRAL = "model.layers.1.block_sparse_moe"
QWEN = "model.layers.1.mlp"

Change = Callable[..., Any]


def layout_of(folder: Path) -> Layout:
    with SourceModel(folder) as model:
        return read_layout(model)


def refusal(folder: Path, kind: type[MoeqError]) -> str:
    with pytest.raises(kind) as error:
        layout_of(folder)
    return str(error.value)


def test_mixtral_layers(tiny_mixtral: Path) -> None:
    layout = layout_of(tiny_mixtral)
    layer = layout.layers[1]
    assert (layout.model_type, layout.num_layers, layout.num_experts) == ("mixtral", 2, 16)
    assert (layer.prefix, layer.router) == (f"{MIXTRAL}.experts", f"{MIXTRAL}.gate.weight")
    assert layer.shapes == {"w1": (128, 64), "w3": (128, 64), "w2": (64, 128)}
    assert layer.weight(3, "w2") == f"{MIXTRAL}.experts.3.w2.weight"


def test_qwen3_moe_layers(tiny_qwen3_moe: Path) -> None:
    layout = layout_of(tiny_qwen3_moe)
    layer = layout.layers[1]
    assert (layout.model_type, layout.num_layers, layout.num_experts) == ("qwen3_moe", 2, 8)
    assert (layer.prefix, layer.router) == (f"{QWEN}.experts", f"{QWEN}.gate.weight")
    assert layer.shapes == {"gate_proj": (64, 64), "up_proj": (64, 64), "down_proj": (64, 64)}


@pytest.mark.parametrize("model", ["tiny_mixtral", "tiny_qwen3_moe"])
def test_linears_are_the_attention(model: str, request: pytest.FixtureRequest) -> None:
    linears = layout_of(request.getfixturevalue(model)).linears
    expected = {f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(2) for name in "qkvo"}
    assert set(linears) == expected


@pytest.mark.parametrize("model", ["tiny_mixtral", "tiny_qwen3_moe"])
def test_embeddings_routers_and_norms_are_kept(model: str, request: pytest.FixtureRequest) -> None:
    layout = layout_of(request.getfixturevalue(model))
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", *layout.routers} <= set(layout.kept)


def test_a_layer_without_a_router_and_experts_is_dense(qwen3_moe_copy: Path, change_tensor: Change) -> None:
    for expert in range(4):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            change_tensor(qwen3_moe_copy, f"model.layers.0.mlp.experts.{expert}.{projection}.weight", None)
    change_tensor(qwen3_moe_copy, "model.layers.0.mlp.gate.weight", None)
    dense = "model.layers.0.mlp.up_proj.weight"
    change_tensor(qwen3_moe_copy, dense, torch.ones(128, 64, dtype=torch.bfloat16), beside="lm_head.weight")
    layout = layout_of(qwen3_moe_copy)
    assert [layer.index for layer in layout.layers] == [1]
    assert dense in layout.linears


@pytest.mark.parametrize("model_type", ["llama", "t5", None])
def test_an_unknown_architecture_lists_what_looks_like_experts(
    mixtral_copy: Path, change_config: Change, model_type: object
) -> None:
    change_config(mixtral_copy, lambda config: config.update(model_type=model_type))
    message = refusal(mixtral_copy, UsageError)
    assert f"model_type {model_type!r} cannot be read: it has no row in the table, and " in message
    assert "model.layers.N.block_sparse_moe.experts.N.w1.weight" in message


@pytest.mark.parametrize("projection", ["w1", "w2", "w3"])
def test_a_missing_expert_tensor_is_named(mixtral_copy: Path, change_tensor: Change, projection: str) -> None:
    name = f"{MIXTRAL}.experts.5.{projection}.weight"
    change_tensor(mixtral_copy, name, None)
    assert f"tensor {name} is missing" in refusal(mixtral_copy, CheckpointError)


def test_a_missing_router_is_named(mixtral_copy: Path, change_tensor: Change) -> None:
    change_tensor(mixtral_copy, f"{MIXTRAL}.gate.weight", None)
    assert f"tensor {MIXTRAL}.gate.weight is missing" in refusal(mixtral_copy, CheckpointError)


def test_a_model_without_any_router_is_refused(mixtral_copy: Path, change_config: Change) -> None:
    change_config(mixtral_copy, lambda config: config.update(model_type="qwen3_moe", num_experts=8))
    assert "expected routers such as model.layers.0.mlp.gate.weight" in refusal(mixtral_copy, CheckpointError)


def test_a_quantized_model_is_refused(quantized_mixtral: Path) -> None:
    assert "found a checkpoint of moeq; moeq export writes its values" in refusal(quantized_mixtral, UsageError)


def test_more_experts_in_the_config_are_refused(mixtral_copy: Path, change_config: Change) -> None:
    change_config(mixtral_copy, lambda config: config.update(num_local_experts=9))
    assert "gate.weight: expected [9, hidden], found [8, 64]" in refusal(mixtral_copy, CheckpointError)


def test_fewer_experts_than_the_checkpoint_has_are_refused(
    mixtral_copy: Path, change_config: Change, change_tensor: Change
) -> None:
    change_config(mixtral_copy, lambda config: config.update(num_local_experts=7))
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        change_tensor(mixtral_copy, name, lambda tensor: tensor[:7].contiguous())
    assert "the config has 7 experts" in refusal(mixtral_copy, CheckpointError)


@pytest.mark.parametrize("count", [None, 0, -1, "8", 8.0, True])
def test_a_damaged_expert_count_is_refused(mixtral_copy: Path, change_config: Change, count: object) -> None:
    change_config(mixtral_copy, lambda config: config.update(num_local_experts=count))
    assert re.search(r"(num_local_experts: )?expected a positive integer", refusal(mixtral_copy, ConfigError))


def test_an_expert_of_another_shape_is_named(mixtral_copy: Path, change_tensor: Change) -> None:
    name = f"{MIXTRAL}.experts.2.w1.weight"
    change_tensor(mixtral_copy, name, lambda tensor: tensor[:64].contiguous())
    assert f"tensor {name}: expected [128, 64] as in expert 0, found [64, 64]" in refusal(mixtral_copy, CheckpointError)


@pytest.mark.parametrize("value", [torch.zeros(128 * 64), torch.zeros(128, 64, dtype=torch.int8)])
def test_an_expert_that_is_no_float_matrix_is_named(
    mixtral_copy: Path, change_tensor: Change, value: torch.Tensor
) -> None:
    name = f"{MIXTRAL}.experts.2.w1.weight"
    change_tensor(mixtral_copy, name, value)
    assert f"tensor {name}: expected a 2-D float tensor" in refusal(mixtral_copy, CheckpointError)


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{", ""])
def test_a_damaged_config_is_refused(mixtral_copy: Path, text: str) -> None:
    (mixtral_copy / "config.json").write_text(text)
    assert str(mixtral_copy / "config.json") in refusal(mixtral_copy, ConfigError)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_either_name_of_the_expert_count_is_read(qwen3_moe_copy: Path, change_config: Change, key: str) -> None:
    def rename(config: dict[str, Any]) -> None:
        for name in ("num_experts", "num_local_experts"):
            config.pop(name, None)
        config[key] = 4

    change_config(qwen3_moe_copy, rename)
    assert layout_of(qwen3_moe_copy).num_experts == 8

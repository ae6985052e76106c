"""Models without a row of the table, recognized by transformers' classes: nothing here has weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.families import FAMILIES, config_json
from planner.model.architectures import ARCHITECTURES, Architecture
from planner.model.recognize import architecture_for, find_architecture, why_unserved
from planner.model.structure import read_structure
from tests.architectures import SIZES, TINY
from vllm_moeq.completeness import meta_model
from vllm_moeq.format import UsageError

ONLY_ROWS = ("llama4", "llama4_text", "switch_transformers")
"""Architectures whose experts transformers does not mark."""

ROW_KNOWS_MORE = ("gpt_oss",)
"""Architectures that vLLM cannot serve for another reason than what their experts compute."""

PLACES = {
    "qwen3_5_moe": ("model.language_model.layers", "mlp.experts", "mlp.gate.weight"),
    "qwen3_5_moe_text": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "qwen3_vl_moe": ("model.language_model.layers", "mlp.experts", "mlp.gate.weight"),
    "deepseek_v32": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "glm_moe_dsa": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "glm4_moe_lite": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "kimi_k2": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "kimi_k25": ("language_model.model.layers", "mlp.experts", "mlp.gate.weight"),
    "glm4v_moe": ("model.language_model.layers", "mlp.experts", "mlp.gate.weight"),
    "gemma4": ("model.language_model.layers", "experts", "router.proj.weight"),
    "nemotron_h": ("backbone.layers", "mixer.experts", "mixer.gate.weight"),
    "minimax_m3_vl": ("language_model.model.layers", "block_sparse_moe.experts", "block_sparse_moe.gate.weight"),
    "lfm2_moe": ("model.layers", "feed_forward.experts", "feed_forward.gate.weight"),
    "afmoe": ("model.layers", "mlp.experts", "mlp.router.gate.weight"),
    "laguna": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "granitemoehybrid": ("model.layers", "block_sparse_moe.experts", "block_sparse_moe.router.layer.weight"),
    "hy_v3": ("model.layers", "mlp.experts", "mlp.router.gate.weight"),
    "kimi_linear": ("model.layers", "block_sparse_moe.experts", "block_sparse_moe.gate.weight"),
    "jamba": ("model.layers", "feed_forward.experts", "feed_forward.router.weight"),
    "hunyuan_v1_moe": ("model.layers", "mlp.experts", "mlp.gate.wg.weight"),
    "mimo_v2_flash": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "mellum": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "cohere2_moe": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "mistral4": ("model.layers", "mlp.experts", "mlp.gate.weight"),
    "deepseek_v4": ("layers", "ffn.experts", "ffn.gate.weight"),
}
"""``model_type`` → where published files have layers, experts and routers."""

COMPUTED = {
    "gemma4": "gelu_tanh with a gate",
    "nemotron_h": "relu2 without a gate",
    "minimax_m3_vl": "silu with a gate alpha=1.702 limit=7 beta=1",
    "deepseek_v4": "silu with a gate limit=10",
}
"""What the experts of some families compute, in the words of the note about them; those of others, silu with a gate."""


def read_row(name: str) -> Architecture:
    """Return what the structure says of a model that has a row."""
    import transformers

    tiny = TINY[name]
    sizes = {key: value for key, value in {**SIZES, **tiny.sizes}.items() if key not in tiny.without}
    config = json.loads(getattr(transformers, tiny.config)(**sizes).to_json_string())
    return read_structure(meta_model({**config, **tiny.published}, Path("config.json")), name, "config.json")


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(ONLY_ROWS)))
def test_the_structure_says_what_the_row_does(name: str) -> None:
    row, found = ARCHITECTURES[name], read_row(name)
    same = ("router", "experts", "projections", "expert")
    assert [getattr(found, key) for key in same] == [getattr(row, key) for key in same]
    assert found.stacks[0].layers == row.stacks[0].layers
    assert (found.unserved is None) == (row.unserved is None or name in ROW_KNOWS_MORE)
    assert found.uncalibrated == row.uncalibrated
    if row.fused is not None:
        assert found.fused == row.fused
    for module, saved in row.renamed:
        known = [pair for pair in found.renamed if f"{pair[0]}.".startswith(f"{module}.")]
        assert known
        assert all(it[1].startswith(saved) for it in known)


@pytest.mark.parametrize("name", PLACES)
def test_a_family_without_a_row_is_recognized(name: str) -> None:
    found = find_architecture(config_json(name))
    assert found is not None
    assert (found.stacks[0].layers, found.experts, found.router) == PLACES[name]
    assert found.recognized is not None
    assert found.recognized.startswith(f"{name} has no row of its own and was recognized by transformers' ")
    assert "\n" not in found.recognized
    assert f"Experts, {COMPUTED.get(name, 'silu with a gate')})" in found.recognized
    assert found.unserved is found.uncalibrated is found.unloaded is None


def test_what_one_model_of_a_row_computes_is_derived() -> None:
    import transformers

    tiny = TINY["mixtral"]
    sizes = {**SIZES, **tiny.sizes}
    plain, gelu = (
        json.loads(transformers.MixtralConfig(**sizes, hidden_act=act).to_json_string()) for act in ("silu", "gelu")
    )
    assert why_unserved(plain) is None
    assert (
        why_unserved(gelu)
        == "transformers' MixtralExperts.act_fn: expected silu or gelu_tanh or relu2, found GELUActivation"
    )


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_linears_that_vllm_does_not_quantize_stay(name: str) -> None:
    found = find_architecture(config_json(name))
    assert found is not None
    prefix = "model.layers.0.self_attn.indexer"
    assert [f"{prefix}.{leaf}.weight".endswith(found.kept) for leaf in ("wk", "weights_proj", "wq_b")] == [1, 1, 0]


def test_all_families_have_a_place() -> None:
    assert set(PLACES) | {"longcat_flash"} == {name.split("-")[0] for name in FAMILIES}


def test_names_on_disk_lead_to_modules_and_back() -> None:
    found = find_architecture(config_json("kimi_linear"))
    assert found is not None
    for module, saved in (
        ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
        ("mlp.gate_proj.weight", "mlp.gate_proj.weight"),
        ("mlp.shared_experts.up_proj.weight", "block_sparse_moe.shared_experts.up_proj.weight"),
        ("self_attn.forget_gate.dt_bias", "self_attn.dt_bias"),
        ("self_attn.q_proj.weight", "self_attn.q_proj.weight"),
    ):
        assert found.saved_name(module) == saved
        assert found.module_name(saved) == module


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as error:
        architecture_for(config, Path("folder"), ["model.layers.3.mlp.experts.0.up_proj.weight"])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("folder/config.json: model_type ")
    return message


def test_experts_of_two_numbers_are_refused_with_their_tensors() -> None:
    message = refusal(config_json("longcat_flash"))
    assert "expected tensors of as many experts, found gate_up_proj [12, 256, 128], down_proj [8, 128, 128]" in message
    assert message.endswith("tensors that look like experts: model.layers.N.mlp.experts.N.up_proj.weight")


def test_a_model_without_experts_is_refused() -> None:
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=64)
    made = {**json.loads(config.to_json_string()), "num_experts": 8}
    assert "LlamaForCausalLM: expected a module of experts in numbered layers" in refusal(made)
    assert find_architecture(made) is None


def test_an_unknown_model_type_is_refused() -> None:
    assert "has no class for model_type 'nobody'" in refusal({"model_type": "nobody"})


def marked_model() -> Any:
    """Return a tiny Qwen3-MoE that a test may change."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_experts=4, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.Qwen3MoeForCausalLM(config)


def test_experts_without_transformers_marks_are_refused_by_the_attribute() -> None:
    model = marked_model()
    del model.model.layers[0].mlp.experts.has_gate
    with pytest.raises(UsageError, match=r"Qwen3MoeExperts\.has_gate: expected True or False, found nothing"):
        read_structure(model, "new", "config.json")


def test_experts_with_a_tensor_of_their_own_are_refused_by_its_name() -> None:
    model = marked_model()
    model.model.layers[0].mlp.experts.norm = torch.nn.Parameter(torch.empty(4, 32, 1, device="meta"))
    with pytest.raises(UsageError, match=r"Qwen3MoeExperts\.norm: expected no such tensor"):
        read_structure(model, "new", "config.json")


def test_two_modules_of_experts_in_a_layer_are_refused() -> None:
    model = marked_model()
    model.model.layers[0].mlp.more = model.model.layers[0].mlp.experts.__class__(model.config)
    with pytest.raises(UsageError, match=r"one module of experts per layer, found .*mlp\.experts and .*mlp\.more"):
        read_structure(model, "new", "config.json")


def test_a_missing_router_is_refused() -> None:
    model = marked_model()
    model.model.layers[0].mlp.gate = torch.nn.Identity()
    with pytest.raises(UsageError, match=r"one router of shape \[4, 32\] beside mlp\.experts, found none"):
        read_structure(model, "new", "config.json")


def test_a_shared_expert_with_as_many_neurons_is_no_router() -> None:
    model = marked_model()
    block = model.model.layers[0].mlp
    with torch.device("meta"):
        block.shared = torch.nn.ModuleDict({"up": torch.nn.Linear(32, 4), "down": torch.nn.Linear(4, 32)})
    assert read_structure(model, "new", "config.json").router == "mlp.gate.weight"


def test_an_attribute_that_nobody_knows_makes_a_model_that_is_only_read() -> None:
    model = marked_model()
    model.model.layers[0].mlp.experts.limit = 7.0
    found = read_structure(model, "new", "config.json")
    reason = "transformers' Qwen3MoeExperts.limit: expected experts without it, found 7.0"
    assert found.unserved == found.uncalibrated == found.unloaded == reason

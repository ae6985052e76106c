"""What is said of a config of which transformers makes no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.models.families import config_json
from vllm_moeq.completeness import cannot_build, cannot_load, meta_model, no_class
from vllm_moeq.completeness.expected import expected_tensors
from vllm_moeq.format import ConfigError


@pytest.mark.parametrize("say", [cannot_build, cannot_load])
def test_an_error_of_many_lines_is_said_in_one(say: object) -> None:
    assert callable(say)
    message = str(say(Path("folder"), ValueError("expected one of\n\n  A\n  B" + " C" * 1000)))
    assert message.startswith("folder: transformers cannot ")
    assert "(expected one of A B C C" in message
    assert "\n" not in message
    assert len(message) < 400


def test_an_infinity_is_read_as_transformers_writes_it() -> None:
    import transformers

    made = transformers.GraniteMoeHybridConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4, layer_types=["mamba"], mamba_n_heads=2, mamba_d_head=32,
        mamba_d_state=16, shared_intermediate_size=32,
    )  # fmt: skip
    config = json.loads(made.to_json_string())
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert meta_model(config, Path("config.json")).config.time_step_limit == (0.0, float("inf"))


def test_a_model_type_that_others_code_reads_as_anothers_has_its_class() -> None:
    assert no_class({"model_type": "kimi_k2"}) is None
    assert "no class for model_type 'kimi_k3'" in str(no_class({"model_type": "kimi_k3"}))


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "Qwen3_MoeForCausalLM", "qwen3moeforcausallm"])
def test_published_names_of_classes_differ_in_capitals_and_underscores(name: str) -> None:
    import transformers

    config = json.loads(transformers.Qwen3MoeConfig(num_hidden_layers=1, vocab_size=64).to_json_string())
    assert type(meta_model({**config, "architectures": [name]}, Path("c"))).__name__ == "Qwen3MoeForCausalLM"
    with pytest.raises(ConfigError, match="architectures: expected a class of model_type qwen3_moe"):
        meta_model({**config, "architectures": [f"{name}X"]}, Path("c"))


def small_mixtral(**changes: object) -> dict[str, object]:
    import transformers

    made = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, head_dim=16,
    )  # fmt: skip
    return {**json.loads(made.to_json_string()), **changes}


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "changes",
    [{"partial_rotary_factor": 0.5}, {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}],
)
def test_a_part_of_heads_that_only_vllm_would_rotate(changes: dict[str, object]) -> None:
    with pytest.raises(
        ConfigError, match=r"^c: partial_rotary_factor: .* which MixtralForCausalLM has not, found 0\.5"
    ):
        meta_model(small_mixtral(**changes), Path("c"))


def test_a_part_of_heads_that_both_rotate() -> None:
    import transformers

    yarn = {**PLAIN, "rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}
    meta_model(small_mixtral(rope_parameters={**yarn, "original_max_position_embeddings": 64}), Path("c"))
    meta_model(small_mixtral(rope_parameters={**PLAIN, "partial_rotary_factor": 1.0}), Path("c"))
    glm = json.loads(
        transformers.Glm4MoeConfig(num_hidden_layers=1, vocab_size=64, hidden_size=64, head_dim=16).to_json_string()
    )
    assert glm["rope_parameters"]["partial_rotary_factor"] == 0.5
    meta_model(glm, Path("c"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "bogus"}, "^c: hidden_act: transformers cannot build the model"),
        (
            {"rope_parameters": {**PLAIN, "rope_type": "bogus"}},
            "^c: rope_parameters.rope_type: transformers cannot build",
        ),
        ({"text_config": {}}, "^c: text_config: expected no such key in a config of MixtralConfig"),
    ],
)
def test_the_key_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        meta_model(small_mixtral(**changes), Path("c"))


def test_a_model_of_too_many_modules_is_not_built() -> None:
    import transformers

    made = transformers.NllbMoeConfig(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, num_experts=200,
        encoder_attention_heads=1, decoder_attention_heads=1, encoder_ffn_dim=4, decoder_ffn_dim=4,
        encoder_sparse_step=1, decoder_sparse_step=1,
    )  # fmt: skip
    config = json.loads(made.to_json_string()) | {"architectures": ["NllbMoeForConditionalGeneration"]}
    config |= {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 2}
    assert sum(1 for _ in meta_model(config, Path("c")).modules()) > 2000
    with pytest.raises(ConfigError, match=r"^c: expected a model of at most 2000 modules and parameters, found more"):
        meta_model(config, Path("c"), 2000)
    assert sum(1 for _ in meta_model(config, Path("c")).modules()) > 2000


def test_the_wrapper_of_kimi_k25_has_its_published_names() -> None:
    """transformers' renamings, read backwards, give others for which no name in a file stands."""
    names = expected_tensors(config_json("kimi_k25"), Path("config.json")).tensors
    assert {"mm_projector.pre_norm.weight", "vision_tower.patch_embed.proj.weight"} <= names.keys()

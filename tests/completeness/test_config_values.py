"""Values in config.json are of their kind, and every number is finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.architectures import TINY, build
from tests.conftest import one_line
from tests.paths import MODELS, SHIPPED
from vllm_moeq.completeness.config_values import KINDS, MAX_NUMBER, check_values
from vllm_moeq.format import ConfigError, read_json

PATH = Path("config.json")
HUGE = 10**400
SIZES = ("hidden_size", "num_hidden_layers", "num_local_experts", "vocab_size", "head_dim", "decoder_sparse_step")
COUNTS = ("n_group", "first_k_dense_replace", "num_nextn_predict_layers", "shared_expert_intermediate_size")

BAD: dict[str, list[Any]] = {
    **{key: [-1, 0, 10**8, HUGE, 2.5, "4", float("nan"), float("inf"), True, {}, [4, 0], [-1]] for key in SIZES},
    **{key: [-1, 10**8, HUGE, 2.5, "4", float("nan"), True, {}, ["x"]] for key in COUNTS},
    "max_position_embeddings": [-1, 0, HUGE, "4096"],
    "sliding_window": [-1, 2.5],
    "rope_theta": [-1, 0, float("nan"), float("inf"), HUGE, True, [], {}, "x"],
    "rms_norm_eps": [-1e-5, 2.5, float("nan"), float("inf")],
    "attention_dropout": [float("nan"), float("inf"), HUGE],
    "tie_word_embeddings": [1, "true"],
    "model_type": [4, True, [], {}],
    "architectures": [4, "MixtralForCausalLM", {}, [4]],
    "dtype": [4, "4", True, [], {}, "nn", "quantized.x", "float64", "float8_e4m3fn"],
    "transformers_version": [5, "4\nx"],
    "hidden_act": [4, {}],
    "text_config": [4, "x", []],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values], ids=str)
def test_what_no_model_has_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {key}: expected .*, found .{{1,60}}$"):
        check_values({key: value}, PATH)


@pytest.mark.parametrize("outer", ["rope_parameters", "rope_scaling", "text_config"])
def test_settings_within_are_checked(outer: str) -> None:
    for inner in ({"rope_theta": 0}, {"rope_theta": float("nan")}):
        with pytest.raises(ConfigError, match="rope_theta: expected"):
            check_values({outer: inner}, PATH)
    with pytest.raises(ConfigError, match="factor: expected a positive number, found -1"):
        check_values({"text_config": {"rope_scaling": {"full_attention": {"factor": -1}}}}, PATH)


def test_a_number_that_is_not_finite_is_found_anywhere() -> None:
    with pytest.raises(ConfigError, match=r"a\.b\.c: expected a number up to 2\^53, found nan"):
        check_values({"a": {"b": [{"c": float("nan")}]}}, PATH)


def test_what_models_have_is_accepted() -> None:
    check_values({"time_step_limit": [0.0, float("inf")], "pad_token_id": -1, "vision_config": {"depth": 0}}, PATH)
    check_values(dict.fromkeys(KINDS) | {"intermediate_size": [64, 128], "rope_parameters": {}}, PATH)
    check_values({"dtype": "bfloat16", "torch_dtype": "torch.float16", "sliding_window": 4096}, PATH)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configs_are_accepted(name: str) -> None:
    check_values(read_json(MODELS / name / "config.json"), PATH)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_accepted(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    check_values(read_json(tmp_path / "config.json"), PATH)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KINDS, "x"]), inner, max_size=4),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(st.dictionaries(st.sampled_from([*KINDS, "rope_parameters", "x"]), JSON, max_size=6))
def test_any_json_passes_or_is_refused_in_one_line(config: dict[str, Any]) -> None:
    message = ""
    try:
        check_values(config, PATH)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.slow
def test_commands_name_the_key(moeq: Callable[..., Any], mixtral_copy: Path, quantized_copy: Path) -> None:
    for folder in (mixtral_copy, quantized_copy):
        config = read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": float("nan")}))
    text = MODELS / "calibration.jsonl"
    for command in (
        ("inspect", mixtral_copy),
        ("plan", mixtral_copy),
        ("quantize", mixtral_copy, "-o", mixtral_copy / "out"),
        ("eval", mixtral_copy, "--data", text),
        ("verify", quantized_copy),
        ("serve", quantized_copy),
        ("export", quantized_copy, "-o", quantized_copy / "out"),
        ("eval", quantized_copy, "--data", text),
    ):
        assert "rms_norm_eps: expected a number up to 2^53, found nan" in one_line(moeq(*command)), command
    assert MAX_NUMBER == 2**53

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from vllm_moeq.format import BIT_WIDTHS, ConfigError, Linear, MoeqConfig, parse_config

PREFIX = "model.layers.0.mlp.experts"

VALID: dict[str, Any] = {
    "quant_method": "moeq",
    "format_version": 1,
    "group_size": 128,
    "projections": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "experts": {PREFIX: [1, 2, 3, 3]},
    "linear": {"bits": 4, "group_size": 128},
    "unquantized": ["lm_head"],
    "plan": {"method": "uniform", "avg_bits": 2.25, "achieved_avg_bits": 2.25, "bit_choices": [1, 2, 3]},
}


def changed(value: object, *path: Any) -> dict[str, Any]:
    """Return the valid configuration with one value replaced."""
    config = copy.deepcopy(VALID)
    place: Any = config
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return config


def refusal(config: object) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(config, "here/config.json")
    message = str(error.value)
    assert message.startswith("here/config.json: ")
    assert "\n" not in message
    return message


def test_a_valid_configuration_is_accepted() -> None:
    assert parse_config(VALID, "x").experts == {PREFIX: [1, 2, 3, 3]}


def test_json_round_trip() -> None:
    config = parse_config(VALID, "x")
    assert parse_config(json.loads(config.model_dump_json(exclude_none=True)), "x") == config


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_every_width_is_accepted(bits: int) -> None:
    config = changed([bits] * 4, "experts", PREFIX)
    config["plan"]["bit_choices"] = [bits]
    assert parse_config(config, "x").experts[PREFIX] == [bits] * 4


@pytest.mark.parametrize("size", [-1, 32, 64, 96, 128, 1024])
def test_group_sizes_that_fit_are_accepted(size: int) -> None:
    assert parse_config(changed(size, "group_size"), "x").group_size == size


@pytest.mark.parametrize("size", [0, 1, 31, 33, 100, -2, -32, 1 << 21, 128.0, -1.0, "128", True, None])
def test_other_group_sizes_are_refused(size: object) -> None:
    assert "group_size" in refusal(changed(size, "group_size"))


@pytest.mark.parametrize("version", [0, 3, -1, "1", 1.0, True, None, [1]])
def test_unknown_versions_are_refused(version: object) -> None:
    assert "format_version must be 1 or 2" in refusal(changed(version, "format_version"))


def test_a_missing_version_is_refused() -> None:
    config = {key: value for key, value in VALID.items() if key != "format_version"}
    assert "format_version must be 1 or 2, found None" in refusal(config)


@pytest.mark.parametrize("method", ["gptq", "MOEQ", "", None, 1, ["moeq"]])
def test_other_methods_are_refused(method: object) -> None:
    assert "quant_method must be 'moeq'" in refusal(changed(method, "quant_method"))


@pytest.mark.parametrize("config", [None, [], "moeq", 1])
def test_anything_but_an_object_is_refused(config: object) -> None:
    assert "must be an object" in refusal(config)


@pytest.mark.parametrize("path", [(), ("projections",), ("linear",), ("plan",)])
def test_unknown_keys_are_refused(path: tuple[str, ...]) -> None:
    assert ".".join((*path, "surprise")) in refusal(changed(1, *path, "surprise"))


@pytest.mark.parametrize("key", ["group_size", "projections", "experts", "linear", "unquantized", "plan"])
def test_missing_keys_are_refused(key: str) -> None:
    config = {name: value for name, value in VALID.items() if name != key}
    assert refusal(config).startswith(f"here/config.json: {key}: ")


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 16, -1, "3", 3.0, True, None, [3]])
def test_impossible_widths_are_refused(bits: object) -> None:
    assert f"experts.{PREFIX}.2" in refusal(changed([1, 2, bits, 3], "experts", PREFIX))


def test_widths_outside_the_choices_are_refused() -> None:
    message = refusal(changed([1, 2, 4, 3], "experts", PREFIX))
    assert f"{PREFIX}: expert 2 has 4 bits" in message


@pytest.mark.parametrize("bits", [0, 3, 5, 32, "4", 4.0, True])
def test_linear_widths_that_vllm_does_not_serve_are_refused(bits: object) -> None:
    assert "linear.bits" in refusal(changed(bits, "linear", "bits"))


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "a\\b", "a b", "-a", "a\nb", "a\x00b", "é", "a" * 513])
def test_bad_layer_names_are_refused(name: str) -> None:
    assert "experts" in refusal(changed({name: [1, 2]}, "experts"))


@pytest.mark.parametrize("name", ["", "../w1", "a/b", "a\n", "w" * 513, 1, None])
def test_bad_projection_names_are_refused(name: object) -> None:
    assert "projections.gate" in refusal(changed(name, "projections", "gate"))


@pytest.mark.parametrize(("key", "name"), [("gate", "up_proj"), ("up", "down_proj"), ("down", "gate_proj")])
def test_a_name_for_two_projections_is_refused(key: str, name: str) -> None:
    assert f"projections: expected a name for each matrix, found {name} twice" in refusal(
        changed(name, "projections", key)
    )


@pytest.mark.parametrize("names", ["lm_head", [""], ["../x"], [1], {"a": 1}, None])
def test_bad_unquantized_lists_are_refused(names: object) -> None:
    assert "unquantized" in refusal(changed(names, "unquantized"))


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({}, ("experts",)),
        ([], ("experts", PREFIX)),
        ([1] * 4097, ("experts", PREFIX)),
        ({f"layer{i}": [1] for i in range(1025)}, ("experts",)),
        (["a"] * 100_001, ("unquantized",)),
        ([1] * 6, ("plan", "bit_choices")),
        ("m" * 65, ("plan", "method")),
    ],
)
def test_empty_and_huge_collections_are_refused(value: object, path: tuple[str, ...]) -> None:
    message = refusal(changed(value, *path))
    assert ".".join(path) in message
    assert len(message) < 1000


@pytest.mark.parametrize("value", ["2.5", 0.5, 9.0, float("nan"), float("inf"), None])
def test_impossible_averages_are_refused(value: object) -> None:
    assert "plan.avg_bits" in refusal(changed(value, "plan", "avg_bits"))


@pytest.mark.parametrize("value", [0.5, float("nan"), "3"])
def test_impossible_zetas_are_refused(value: object) -> None:
    assert "plan.zeta" in refusal(changed(value, "plan", "zeta"))


def test_a_configuration_cannot_be_changed_after_validation() -> None:
    config = parse_config(VALID, "x")
    with pytest.raises(ValueError, match="frozen"):
        config.group_size = 64  # type: ignore[misc]


def test_linears_become_a_compressed_tensors_configuration() -> None:
    config = Linear(bits=4, group_size=64).compressed_tensors()
    group = config["config_groups"]["group_0"]
    assert (config["format"], config["ignore"]) == ("pack-quantized", [])
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 64)


def test_the_schema_forbids_unknown_keys_in_python_too() -> None:
    with pytest.raises(ValueError, match="surprise"):
        MoeqConfig.model_validate({**VALID, "surprise": 1})


@pytest.mark.parametrize("threshold", [0, 0.0, 0.3, 1, 1.0])
def test_thresholds_are_accepted(threshold: float) -> None:
    assert parse_config(changed({PREFIX: threshold}, "odp"), "x").odp == {PREFIX: threshold}


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), float("inf"), "0.3", True, None, [0.3]])
def test_impossible_thresholds_are_refused(threshold: object) -> None:
    assert f"odp.{PREFIX}" in refusal(changed({PREFIX: threshold}, "odp"))


@pytest.mark.parametrize("odp", [0.3, "0.3", [0.3], {"../x": 0.3}])
def test_anything_but_thresholds_by_layer_is_refused(odp: object) -> None:
    assert "here/config.json: odp" in refusal(changed(odp, "odp"))


def test_a_threshold_of_no_layer_is_refused() -> None:
    message = refusal(changed({PREFIX: 0.3, "model.layers.1.mlp.experts": 0.3}, "odp"))
    assert "odp: model.layers.1.mlp.experts is not among experts" in message


@pytest.mark.parametrize(
    ("fallback", "problem"),
    [
        ({"elsewhere": [0]}, "plan.fallback: elsewhere is not among experts"),
        ({PREFIX: [0, 4]}, f"plan.fallback: {PREFIX}: expected experts below 4, found 4"),
    ],
)
def test_a_fallback_of_no_expert_is_refused(fallback: object, problem: str) -> None:
    assert refusal(changed({**VALID["plan"], "fallback": fallback}, "plan")) == f"here/config.json: {problem}"
    parse_config(changed({**VALID["plan"], "fallback": {PREFIX: [0, 3]}}, "plan"), "x")


def test_thresholds_survive_the_round_trip_and_none_leaves_no_key() -> None:
    config = parse_config(changed({PREFIX: 0.3}, "odp"), "x")
    assert parse_config(json.loads(config.model_dump_json(exclude_none=True)), "x") == config
    assert "odp" not in parse_config(VALID, "x").model_dump(mode="json", exclude_none=True)

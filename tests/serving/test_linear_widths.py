"""Each linear's width by the name that vLLM has for it, alone or joined with others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

from tests.architectures import TINY
from tests.format.test_schema import VALID
from vllm_moeq.format import JOINED, ConfigError, joined, parse_config
from vllm_moeq.format.linears import split_width
from vllm_moeq.serving.linear_widths import LinearWidths, parts_of
from vllm_moeq.serving.metrics import NAME, publish

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp.shared_expert"


def linears(widths: dict[str, int], *unquantized: str, bits: int = 4) -> LinearWidths:
    linear = {"bits": bits, "group_size": 32, "widths": widths}
    config = {**VALID, "format_version": 2 if widths else 1, "linear": linear, "unquantized": list(unquantized)}
    return LinearWidths(parse_config(config, "config.json"))


def eight(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 8)


QKV = eight(*(f"{ATTENTION}.{part}_proj" for part in "qkv"))


@pytest.mark.parametrize(
    ("prefix", "widths", "bits"),
    [
        (f"{ATTENTION}.o_proj", {}, 4),
        (f"{ATTENTION}.o_proj", eight(f"{ATTENTION}.o_proj"), 8),
        (f"{ATTENTION}.o_proj", eight("o_proj", "self_attn.o_proj", "model.layers.10.self_attn.o_proj"), 4),
        (f"{ATTENTION}.qkv_proj", QKV, 8),
        (f"{ATTENTION}.qkv_proj", eight(f"{ATTENTION}.o_proj"), 4),
        (f"{ATTENTION}.gate", {}, 16),
        (f"{MLP}.gate_up_proj", eight(f"{MLP}.gate_proj", f"{MLP}.up_proj"), 8),
        ("layers.0.linear_attn.in_proj_qkvz", eight("layers.0.linear_attn.in_proj_qkvz"), 8),
    ],
)
@pytest.mark.parametrize(
    "mapping", [{}, {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "in_proj_qkvz": ["in_proj_qkvz"]}]
)
def test_the_width_is_that_of_the_parts(
    prefix: str, widths: dict[str, int], bits: int, mapping: dict[str, list[str]]
) -> None:
    assert linears(widths, f"{ATTENTION}.gate").bits_of(prefix, mapping) == bits


@pytest.mark.parametrize(
    ("widths", "unquantized", "found"),
    [
        (eight(f"{ATTENTION}.k_proj"), (), "q_proj 4, k_proj 8, v_proj 4"),
        (eight(f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj"), (), "q_proj 8, k_proj 4, v_proj 8"),
        ({}, (f"{ATTENTION}.v_proj",), "q_proj 4, k_proj 4, v_proj 16"),
    ],
)
def test_widths_that_differ_within_what_vllm_joins_are_refused(
    widths: dict[str, int], unquantized: tuple[str, ...], found: str
) -> None:
    with pytest.raises(ConfigError) as error:
        linears(widths, *unquantized).bits_of(f"{ATTENTION}.qkv_proj", {})
    assert str(error.value) == (
        f"config.json: linear: {ATTENTION}.qkv_proj: expected one width, as vLLM joins its parts, found {found}"
    )


def test_names_follow_the_model_class() -> None:
    renamed = linears(QKV)
    renamed.rename(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert renamed.bits_of(f"language_model.{ATTENTION}.qkv_proj", {}) == 8
    assert renamed.bits_of(f"{ATTENTION}.qkv_proj", {}) == 4


@pytest.mark.parametrize(
    ("widths", "name", "expected"),
    [({}, "o_proj", 4), (eight(f"{ATTENTION}.o_proj"), "o_proj", 8), (eight(f"{ATTENTION}.o_proj"), "kv_b_proj", 4)],
)
def test_the_method_has_the_linears_width(widths: dict[str, int], name: str, expected: int) -> None:
    method: Any = linears(widths).method(torch.nn.Module(), f"{ATTENTION}.{name}", {}, torch.float32)
    assert method.linear.bits == expected
    assert method.linear.widths == {}


@pytest.mark.parametrize(("widths", "bits"), [(QKV, 8), ({}, 4)])
def test_vllms_own_method_gets_the_width(widths: dict[str, int], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_moeq.serving.linear_widths.unserved", lambda *_: None)
    layer = ReplicatedLinear.__new__(ReplicatedLinear)  # vLLM's method looks at the class and the name
    torch.nn.Module.__init__(layer)
    method = linears(widths).method(layer, f"{ATTENTION}.qkv_proj", {}, torch.bfloat16)
    assert type(method).__name__ == "CompressedTensorsLinearMethod"
    assert layer.scheme.num_bits == bits


def test_the_metric_names_every_width() -> None:
    config = {**VALID, "format_version": 2, "linear": {"bits": 8, "group_size": 32, "widths": {"a.b": 4}}}
    publish(parse_config(config, "config.json"))
    labels = [sample.labels for metric in REGISTRY.collect() for sample in metric.samples if sample.name == NAME]
    assert [it["linear_bits"] for it in labels] == ["4,8"]


def test_a_name_without_parent_is_its_own_part() -> None:
    assert parts_of("qkv_proj", {}) == ("q_proj", "k_proj", "v_proj")
    assert parts_of("a.my_qkv_proj", {}) == ("a.my_qkv_proj",)
    assert joined("q_proj", {"k_proj"}) == ("q_proj", "k_proj")
    assert split_width({"a.q_proj": 4, "a.kv_a_proj_with_mqa": 8, "b.k_proj": 8}) is None


def mappings(source: str) -> Iterator[tuple[str, list[str]]]:
    """Yield what a file of vLLM puts into ``packed_modules_mapping``."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        target = ast.unparse(node.targets[0])
        if target.endswith("packed_modules_mapping") and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).items()
        if "packed_modules_mapping[" in target and isinstance(node.targets[0], ast.Subscript):
            yield ast.literal_eval(node.targets[0].slice), ast.literal_eval(node.value)


@pytest.mark.parametrize("name", TINY)
def test_the_table_has_what_vllm_joins(name: str) -> None:
    """So that verify refuses what the server would."""
    registered: Any = ModelRegistry.models.get(TINY[name].model)
    if registered is None:
        pytest.skip("vLLM has no such model")
    spec = find_spec(registered.module_name)
    assert spec is not None
    assert spec.origin is not None
    several = {key: tuple(parts) for key, parts in mappings(Path(spec.origin).read_text()) if len(parts) > 1}
    assert several
    assert several.items() <= JOINED.items()


def test_a_mamba_block_is_found_by_the_files_name() -> None:
    """vLLM calls GraniteMoeHybrid's ``mamba.in_proj`` ``mixer.in_proj``."""
    known = linears({"layers.0.mamba.out_proj": 8}, "layers.0.mamba.in_proj", "layers.0.attention.q_proj")
    assert known.bits_of("layers.0.mixer.in_proj", {}) == 16
    assert known.bits_of("layers.0.mixer.out_proj", {}) == 8
    assert known.bits_of("layers.1.mixer.in_proj", {}) == 4
    assert known.bits_of("layers.0.mixer.q_proj", {}) == 4

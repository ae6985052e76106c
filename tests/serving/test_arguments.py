"""What vLLM may ask of a layer of experts is computed, refused or known to be harmless; nothing is forgotten."""

from __future__ import annotations

import dataclasses
import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

from tests.compat.signatures import TABLE
from tests.serving.test_parallel import ALONE
from vllm_moeq.format import UsageError
from vllm_moeq.serving.arguments import COMPUTED, HARMLESS, KNOWN, REFUSED, check_arguments

VERSIONS: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())


def layer(**changes: Any) -> Any:
    """Return what the check reads of vLLM's layer, with vLLM's own config."""
    config = FusedMoEConfig(
        num_experts=8, experts_per_token=2, hidden_dim=64, intermediate_size=64, num_local_experts=8,
        num_logical_experts=8, activation=MoEActivation.SILU, device="cpu", routing_method=RoutingMethodType.Default,
        moe_parallel_config=ALONE, in_dtype=torch.float32,
    )  # fmt: skip
    fused = changes.pop("num_fused_shared_experts", 0)
    return SimpleNamespace(
        moe_config=dataclasses.replace(config, **changes),
        expert_map_manager=SimpleNamespace(num_fused_shared_experts=fused),
        activation=changes.get("activation", MoEActivation.SILU),
    )


def test_the_installed_vllm_asks_nothing_unknown() -> None:
    names = {*inspect.signature(FusedMoEFactory).parameters, *inspect.signature(RoutedExperts).parameters}
    names |= {field.name for field in dataclasses.fields(FusedMoEConfig)}
    assert sorted(names - KNOWN) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_no_tested_vllm_asks_something_unknown(version: str) -> None:
    tables = [names for key, names in VERSIONS[version].items() if key.endswith(".arguments")]
    assert len(tables) == 3
    assert sorted({name for names in tables for name in names} - KNOWN - {"self"}) == []


def test_each_name_stands_once_with_a_reason() -> None:
    assert len(KNOWN) == len(COMPUTED) + len(REFUSED) + len(HARMLESS)
    assert all([*COMPUTED.values(), *HARMLESS.values(), *(row.expected for row in REFUSED.values())])


def test_an_ordinary_layer_passes() -> None:
    check_arguments(layer(), "layers.0")
    check_arguments(layer(swiglu_alpha=1.0, swiglu_beta=0.0, has_hash_routing=True), "layers.0")


WRONG: dict[str, Any] = {
    "activation": MoEActivation.GELU,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "swiglu_beta": 1.0,
    "activation_situ_beta": 1.0,
    "activation_situ_linear_beta": 1.0,
    "has_bias": True,
    "intermediate_pad": 32,
    "tp_shard_with_padding": True,
    "num_fused_shared_experts": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_compute_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^layers\.0: {name}: expected .*, found "):
        check_arguments(layer(**{name: WRONG[name]}), "layers.0")


def test_a_field_that_a_later_vllm_adds_is_refused_where_a_model_sets_it() -> None:
    @dataclasses.dataclass
    class Later(FusedMoEConfig):
        gate_power: float = 1.0

    known = {it.name: getattr(layer().moe_config, it.name) for it in dataclasses.fields(FusedMoEConfig) if it.init}
    found = layer()
    found.moe_config = Later(**known)
    check_arguments(found, "layers.0")
    found.moe_config.gate_power = 2.0
    with pytest.raises(UsageError, match=r"^layers\.0: gate_power: expected 1\.0, as no kernel heeds it, found 2\.0"):
        check_arguments(found, "layers.0")

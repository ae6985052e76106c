"""The routing that vLLM's router for CPUs leaves out, and the bias that vLLM does not load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform

from vllm_moeq.serving.checkpoint import Checkpoint
from vllm_moeq.serving.routing import complete_router, load_bias

NAME = "model.layers.0.mlp.experts"
LOGITS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
BIAS = torch.linspace(-0.5, 0.5, 8)

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's other routers are complete")


def completed(router: CPURouter) -> CPURouter:
    config = VllmConfig()
    config.compilation_config.static_forward_context[NAME] = SimpleNamespace(router=router)
    with set_current_vllm_config(config):
        complete_router(SimpleNamespace(layer_name=NAME))  # type: ignore[arg-type]
    return router


def weights_of(router: CPURouter) -> torch.Tensor:
    """Return each token's weight of each expert, 0 for those that it does not choose."""
    weights, experts = router._compute_routing(LOGITS, LOGITS, None)
    return torch.zeros(64, 8).scatter(1, experts.long(), weights)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
def test_sigmoids_without_groups_choose_the_largest(bias: torch.Tensor | None) -> None:
    router = CPURouter(2, 8, scoring_func="sigmoid", e_score_correction_bias=bias, routed_scaling_factor=2.5)
    with pytest.raises(AssertionError):
        weights_of(router)  # once vLLM does this by itself, ours can go
    scores = LOGITS.sigmoid()
    chosen = (scores if bias is None else scores + bias).topk(2).indices
    shares = scores.gather(1, chosen)
    expected = torch.zeros(64, 8).scatter(1, chosen, 2.5 * shares / shares.sum(1, keepdim=True))
    assert torch.allclose(weights_of(completed(router)), expected)


@pytest.mark.parametrize(
    "router",
    [
        CPURouter(2, 8),
        CPURouter(2, 8, scoring_func="sigmoid", use_grouped_topk=True, num_expert_group=4, topk_group=2),
    ],
    ids=["softmax", "groups"],
)
def test_a_complete_router_stays_as_it_is(router: CPURouter) -> None:
    before = weights_of(router)
    assert torch.equal(weights_of(completed(router)), before)


@pytest.mark.parametrize("name", [f"{NAME}.e_score_correction_bias", "model.layers.0.mlp.gate.e_score_correction_bias"])
def test_a_bias_among_the_experts_is_loaded_and_others_are_left_to_vllm(name: str, tmp_path: Path) -> None:
    save_file({name: BIAS.bfloat16()}, tmp_path / "model.safetensors")
    bias = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
    layer = SimpleNamespace(e_score_correction_bias=bias)
    load_bias(layer, NAME, Checkpoint(str(tmp_path)))  # type: ignore[arg-type]
    assert torch.equal(bias, BIAS.bfloat16().float() if name.startswith(NAME) else torch.zeros(8))


def test_without_a_bias_or_files_nothing_is_loaded(tmp_path: Path) -> None:
    load_bias(SimpleNamespace(), NAME, Checkpoint(str(tmp_path)))  # type: ignore[arg-type]
    bias = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
    load_bias(SimpleNamespace(e_score_correction_bias=bias), NAME, None)  # type: ignore[arg-type]
    assert not bias.any()

"""The routing that vLLM's router for CPUs leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform

from vllm_moeq.serving.routing import complete_router

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

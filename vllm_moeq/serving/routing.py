"""Routing that vLLM's router for CPUs leaves out."""

from __future__ import annotations

from typing import Any

from vllm_moeq.serving.seam import RoutedExperts, current_platform, get_current_vllm_config


def complete_router(layer: RoutedExperts) -> None:
    """Let vLLM's router for CPUs choose by sigmoids without groups: one group of all experts is the same choice.

    vLLM's routers for GPUs do both; the one for CPUs stops at its first token with an assertion.

    Args:
        layer: a layer of experts of a model that is built.
    """
    if not current_platform.is_cpu():
        return
    runner = get_current_vllm_config().compilation_config.static_forward_context.get(layer.layer_name)
    router: Any = getattr(runner, "router", None)
    if getattr(router, "scoring_func", None) != "sigmoid" or getattr(router, "custom_routing_function", None):
        return
    if getattr(router, "use_grouped_topk", None) is False:
        router.use_grouped_topk = True
        router.num_expert_group = router.topk_group = 1

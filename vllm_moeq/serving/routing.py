"""Routing that vLLM leaves out: its router for CPUs, and a bias that it does not load."""

from __future__ import annotations

from typing import Any

from vllm_moeq.serving.checkpoint import Checkpoint
from vllm_moeq.serving.seam import RoutedExperts, current_platform, get_current_vllm_config

BIAS = "e_score_correction_bias"


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


def load_bias(layer: RoutedExperts, prefix: str, checkpoint: Checkpoint | None) -> None:
    """Load the bias by which a router chooses, if the checkpoint has it among the experts, as Laguna's.

    vLLM hands what stands there to the loader of experts, which passes over all else without a word.

    Args:
        layer: a layer of experts whose weights are loaded.
        prefix: its name in the checkpoint.
        checkpoint: the checkpoint; None if vLLM did not say which.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    bias = getattr(layer, BIAS, None)
    if bias is None or checkpoint is None:
        return
    stored = checkpoint.tensor(f"{prefix}.{BIAS}")
    if stored is not None:
        bias.data.copy_(stored)

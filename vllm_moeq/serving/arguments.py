"""What vLLM may ask of a layer of experts, and what our kernels make of it.

Each argument of vLLM's factory, of its routed experts and each field of its config stands in one of three tables:
the kernels compute it, they refuse it, or it does not concern them. A test reads vLLM's signatures and fails for a name
that stands in none. Where a later vLLM has one nevertheless, a layer that sets it is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class Refused:
    """What the kernels do not compute.

    Attributes:
        accepted: the values that say that the layer does not have it.
        expected: what the message says was expected.
    """

    accepted: Collection[Any]
    expected: str


COMPUTED = {
    "num_experts": "compared with the number of widths",
    "global_num_experts": "the same number, with redundant experts, which vLLM has with --enable-eplb only",
    "num_logical_experts": "the same number, without them",
    "num_local_experts": "the expert map says which they are",
    "expert_map_manager": "says which experts are this rank's",
    "hidden_size": "the columns of gate and up, the rows of down",
    "hidden_dim": "the same number",
    "intermediate_size": "the rows of gate and up, the columns of down",
    "intermediate_size_per_partition": "this rank's share of them",
    "params_dtype": "the dtype of the activations",
    "in_dtype": "the same dtype",
    "top_k": "the experts of a token, which the kernels are warmed up for",
    "experts_per_token": "the same number",
    "tp_size": "the loader takes this rank's slice",
    "dp_size": "checked with the all-to-all backend",
    "moe_parallel_config": "checked by check_parallel",
    "activation": "a row of ACTIVATIONS in activations.py, or refused",
    "swiglu_limit": "the bound of gate and up, where the activation reads it",
    "swiglu_alpha": "SiLU's factor, where the activation reads it",
    "swiglu_beta": "what is added to up, where the activation reads it",
    "apply_router_weight_on_input": "the method multiplies the input with the weights",
    "quant_config": "ours",
    "prefix": "the layer's name in the checkpoint",
    "layer_name": "the same name",
    "moe_config": "the config whose fields stand here",
    "enable_eplb": "refused by check_options",
    "num_redundant_experts": "refused by check_options, with --enable-eplb",
}
"""Name → how the kernels or this adapter heed it."""

REFUSED = {
    "activation_situ_beta": Refused((None,), "an activation without it"),
    "activation_situ_linear_beta": Refused((None,), "an activation without it"),
    "has_bias": Refused((False,), "experts without biases"),
    "intermediate_pad": Refused((None, 0), "an intermediate size without padding"),
    "tp_shard_with_padding": Refused((False,), "an intermediate size without padding"),
    "num_fused_shared_experts": Refused((0,), "shared experts that are modules of their own"),
}
"""Name → the values that pass; the name is an attribute of the config, of the layer or of its expert map."""

OF_ROUTER = "the router heeds it, before the experts are called"
OF_RUNNER = "the runner heeds it, around the call of the experts"
OF_OTHER_KERNELS = "it picks or sizes vLLM's own kernels, which do not run"
OF_LOADING = "it concerns tensors that hold all experts; ours hold one"

HARMLESS = {
    **dict.fromkeys(
        (
            "renormalize", "use_grouped_topk", "num_expert_group", "topk_group", "custom_routing_function", "router",
            "scoring_func", "routed_scaling_factor", "e_score_correction_bias", "router_logits_dtype",
            "hash_indices_table", "has_hash_routing", "bias_vl", "image_sentinel_lo", "routing_method", "skip_padding",
            "zero_expert_type",
        ),
        OF_ROUTER,
    ),
    **dict.fromkeys(
        (
            "gate", "shared_experts", "shared_expert_gate", "routed_input_transform", "routed_output_transform",
            "apply_routed_scale_to_output", "runner_cls", "runner_args", "reduce_results", "skip_final_all_reduce",
            "is_sequence_parallel", "pcp_size",
        ),
        OF_RUNNER,
    ),
    **dict.fromkeys(
        (
            "moe_backend", "max_num_tokens", "max_capture_size", "rocm_aiter_fmoe_enabled", "use_mxfp4_w4a4_dsv4",
            "defer_moe_finalize_max_num_tokens", "_defer_moe_finalize", "defer_moe_finalize", "device",
            "require_decomposed_backend",
        ),
        OF_OTHER_KERNELS,
    ),
    **dict.fromkeys(("ckpt_names", "ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name"),
                    "names of the checkpoint's tensors, which the loader compares with its own"),
    **dict.fromkeys(("hidden_dim_unpadded", "intermediate_size_per_partition_unpadded"),
                    "sizes before padding, which only all-to-all backends that are refused do"),
    **dict.fromkeys(("n_shared_experts", "fuse_shared_experts", "shared_expert_prefix",
                     "aiter_fmoe_shared_expert_enabled"),
                    "refused where it makes num_fused_shared_experts more than none"),
    "moe_config_cls": "a subclass; a field that stands nowhere is refused unless it has its default",
    **dict.fromkeys(("routed_experts_cls", "routed_experts_args"), "a class with other names of tensors to load"),
    "is_fused_checkpoint_transposed": OF_LOADING,
    "is_lora_enabled": "adapters of experts are refused (options.py); those of other linears leave experts as they are",
    "elastic_ep_max_dp_size": "elastic expert parallelism needs --enable-eplb, which is refused",
}  # fmt: skip
"""Name → why the kernels need not know it."""

KNOWN = frozenset({*COMPUTED, *REFUSED, *HARMLESS})


def check_arguments(layer: Any, prefix: str) -> None:
    """Refuse a layer that asks for what the kernels do not compute, whatever the model is called.

    Args:
        layer: vLLM's ``RoutedExperts``.
        prefix: the layer's name, for the message.

    Raises:
        UsageError: naming the layer and the argument.
    """
    places = (layer.moe_config, layer, layer.expert_map_manager)
    for name, row in REFUSED.items():
        for place in places:
            value = getattr(place, name, None)
            value = getattr(value, "value", value)  # an activation is an enum
            if value is not None and value not in row.accepted:
                raise UsageError(f"{prefix}: {name}: expected {row.expected}, found {value}")
    for field in fields(layer.moe_config):
        value = getattr(layer.moe_config, field.name)
        if field.name not in KNOWN and value != field.default:
            raise UsageError(f"{prefix}: {field.name}: expected {field.default}, as no kernel heeds it, found {value}")

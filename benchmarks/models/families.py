"""Tiny random checkpoints of MoE families that people serve and that have no row in the planner's table."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.models import wrappers

TOKENIZER = Path(__file__).with_name("stdlib-mixtral")
HIDDEN, EXPERTS, LAYERS = 128, 8, 2
BASE: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
MOE = {"moe_intermediate_size": 128}
ROUTED, LOCAL, NUMBER = {"n_routed_experts": EXPERTS}, {"num_local_experts": EXPERTS}, {"num_experts": EXPERTS}
HEADS = {"head_dim": 32}
MLA: dict[str, Any] = {
    "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "num_key_value_heads": 4, "n_shared_experts": 1,
}  # fmt: skip
"""With the published size of what is cached, 512 + 64: vLLM's CPU kernel has no other."""
UNBIASED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
GROUPED = {"n_group": 2, "topk_group": 1}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
INDEXER = {"index_topk": 16, "index_head_dim": 64, "index_n_heads": 32}
GATED_DELTA: dict[str, Any] = {
    **HEADS, **MOE, **NUMBER, "shared_expert_intermediate_size": 128,
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]
    },
}  # fmt: skip
"""Linear heads have the published size: vLLM's CPU kernel takes no other."""
VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN, "patch_size": 4,
    "deepstack_visual_indexes": [0], "image_size": 32,
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to make the checkpoint of a family.

    Attributes:
        name: transformers' classes without their endings ``Config`` and ``For...``.
        sizes: what the config of the language model gets besides :data:`BASE`.
        vision: sizes of the part that sees images; None for a model of text alone.
        around: what the config gets that holds both.
        wrapper: the files with which vLLM serves that part; None where it asks for none, or serves it not at all.
        without: sizes that the class does not have.
        model: ending of the model's class.
        called: the model's class, where it is not called after the config.
        convert: changes the saved tensors into a form that published models have.
        published: what their config.json says otherwise than transformers' own.
    """

    name: str
    sizes: Mapping[str, Any]
    vision: Mapping[str, Any] | None = None
    around: Mapping[str, Any] = field(default_factory=dict)
    wrapper: wrappers.Wrapper | None = None
    without: tuple[str, ...] = ()
    model: str = "ForCausalLM"
    called: str | None = None
    convert: Callable[[Tensors], Tensors] | None = None
    published: Mapping[str, Any] = field(default_factory=dict)


_SEES = "ForConditionalGeneration"


def exchange_last_two(tensors: Tensors) -> Tensors:
    """Exchange the last two dimensions of all fused experts, as the first Qwen3-VL checkpoints have them."""
    fused = ("experts.gate_up_proj", "experts.down_proj")
    return {name: it.mT.contiguous() if name.endswith(fused) else it for name, it in tensors.items()}


def named(*renamed: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Return a function that gives tensors the names of published files, where transformers writes others."""

    def rename(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            for pattern, replacement in renamed:
                name = re.sub(pattern, replacement, name)
            found[name] = tensor
        return found

    return rename


_QWEN3_VL: dict[str, Any] = {
    "name": "Qwen3VLMoe",
    "sizes": {
        **HEADS, **NUMBER, "moe_intermediate_size": 96,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
    },
    "vision": VISION,
    "wrapper": wrappers.QWEN,
    "model": _SEES,
    "published": {"text_config": {"norm_topk_prob": True}},
}  # fmt: skip
_DENSE_APART = named((r"block_sparse_moe\.((gate|up|down)_proj)", r"mlp.\1"))

FAMILIES: dict[str, Family] = {
    "qwen3_5_moe": Family(
        name="Qwen3_5Moe", sizes=GATED_DELTA, vision={**VISION, "deepstack_visual_indexes": []}, wrapper=wrappers.QWEN,
        model=_SEES,
    ),
    "qwen3_5_moe_text": Family(name="Qwen3_5MoeText", sizes=GATED_DELTA),
    "qwen3_vl_moe": Family(**_QWEN3_VL),
    "qwen3_vl_moe-exchanged": Family(**_QWEN3_VL, convert=exchange_last_two),
    "deepseek_v32": Family(name="DeepseekV32", sizes={**MLA, **MOE, **ROUTED, **GROUPED, **DENSE_FIRST, **INDEXER}),
    "glm_moe_dsa": Family(
        name="GlmMoeDsa",
        sizes={**MLA, **MOE, **ROUTED, **GROUPED, **DENSE_FIRST, **INDEXER, "indexer_types": ["full", "full"]},
    ),
    "glm4_moe_lite": Family(
        name="Glm4MoeLite",
        sizes={**MLA, **MOE, **ROUTED, **GROUPED, **DENSE_FIRST},
        published={**UNBIASED, "first_k_dense_replace": 1},
    ),
    "kimi_k2": Family(
        name="DeepseekV3",
        sizes={**MLA, **MOE, **ROUTED, **GROUPED, "first_k_dense_replace": 1},
        published={"model_type": "kimi_k2", **UNBIASED},
    ),
    "kimi_k25": Family(
        name="Kimi_K25",
        sizes={"model_type": "deepseek_v3", **MLA, **MOE, **ROUTED, **GROUPED, **UNBIASED, "first_k_dense_replace": 1},
        vision={"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2},
        wrapper=wrappers.KIMI,
        model=_SEES,
        around={"projection_hidden_size": 64},
        convert=named(
            (r"^(language_model.*)\.blocks\.", r"\1.layers."), (r"^model\.mm_projector", "mm_projector"),
            (r"^vision_tower\.encoder\.patch_embed", "vision_tower.patch_embed"),
        ),
        published={
            "architectures": ["KimiK25ForConditionalGeneration"], "vision_config": {"projector_ln_eps": 1e-5}
        },
    ),
    "glm4v_moe": Family(
        name="Glm4vMoe",
        sizes={
            **HEADS, **MOE, **ROUTED, **GROUPED, "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5
            },
        },
        vision={**VISION, "num_hidden_layers": 1},
        wrapper=wrappers.GLM,
        model=_SEES,
        published={"text_config": {"use_qk_norm": False}},
    ),
    "gemma4": Family(
        name="Gemma4",
        sizes={
            **HEADS, **MOE, **NUMBER, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
            "global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"],
        },
        vision={"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 32, "default_output_length": 64},
        model=_SEES,
    ),
    "nemotron_h": Family(
        name="NemotronH",
        sizes={
            **HEADS, **MOE, **ROUTED, "layers_block_type": ["mamba", "moe", "attention", "moe"], "ssm_state_size": 16,
            "num_hidden_layers": 4, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "chunk_size": 32,
            "moe_shared_expert_intermediate_size": 128,
        },
    ),
    "minimax_m3_vl": Family(
        name="MiniMaxM3VL",
        sizes={
            **HEADS, **LOCAL, "intermediate_size": 128, "dense_intermediate_size": 256, "rotary_dim": 16,
            "shared_intermediate_size": 128, "index_n_heads": 2, "index_head_dim": 32, **DENSE_FIRST,
        },
        vision={"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2},
        called="MiniMaxM3SparseForConditionalGeneration",
        convert=_DENSE_APART,
    ),
    "lfm2_moe": Family(
        name="Lfm2Moe",
        sizes={**MOE, **NUMBER, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        without=("head_dim",),
    ),
    "afmoe": Family(
        name="Afmoe",
        sizes={**HEADS, **MOE, **NUMBER, "num_dense_layers": 1, "num_shared_experts": 1},
        published={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    ),
    "laguna": Family(
        name="Laguna", sizes={**HEADS, **MOE, **NUMBER, **DENSE_FIRST, "shared_expert_intermediate_size": 128}
    ),
    "granitemoehybrid": Family(
        name="GraniteMoeHybrid",
        sizes={
            **LOCAL, "intermediate_size": 128, "shared_intermediate_size": 128, "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 32, "logits_scaling": 2.0,
            "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        },
    ),
    "hy_v3": Family(
        name="HYV3",
        sizes={**HEADS, **MOE, **NUMBER, **DENSE_FIRST, "num_shared_experts": 1},
        published={"first_k_dense_replace": 1, "expert_hidden_dim": 128, "route_norm": True, "qk_norm": True},
    ),
    "kimi_linear": Family(
        name="KimiLinear",
        sizes={
            **MLA, **MOE, **LOCAL, **DENSE_FIRST, "q_lora_rank": None, "linear_head_dim": 32, "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"], "n_group": 1, "topk_group": 1,
        },
        convert=_DENSE_APART,
    ),
    "jamba": Family(
        name="Jamba",
        sizes={
            **NUMBER, "intermediate_size": 128, "expert_layer_period": 2, "attn_layer_period": 2,
            "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False,
        },
    ),
    "hunyuan_v1_moe": Family(
        name="HunYuanMoEV1",
        sizes={**HEADS, **NUMBER, "intermediate_size": 128, "moe_topk": 2},
        without=("num_experts_per_tok",),
    ),
    "mimo_v2_flash": Family(
        name="MiMoV2Flash",
        sizes={
            **HEADS, **MOE, **ROUTED, **GROUPED, **DENSE_FIRST, "v_head_dim": 32,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        published={
            "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5, "swa_head_dim": 32,
            "swa_v_head_dim": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
            "sliding_window_size": 128, "rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334,
        },
    ),
    "mellum": Family(
        name="Mellum",
        sizes={**HEADS, **MOE, **LOCAL, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128},
    ),
    "cohere2_moe": Family(
        name="Cohere2Moe",
        sizes={
            **HEADS, **NUMBER, "intermediate_size": 128, "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 128, "logit_scale": 0.25, "tie_word_embeddings": True,
        },
    ),
    "mistral4": Family(name="Mistral4", sizes={**MLA, **MOE, **ROUTED, **GROUPED}),
    "deepseek_v4": Family(
        name="DeepseekV4",
        sizes={
            **HEADS, **MOE, **ROUTED, **INDEXER, "q_lora_rank": 64, "num_key_value_heads": 1, "o_groups": 2,
            "o_lora_rank": 32, "qk_rope_head_dim": 16, "n_shared_experts": 1,
        },
        without=("intermediate_size",),
        convert=named(
            (r"^model\.embed_tokens", "embed"), (r"^model\.hc_head\.hc", "hc_head"), (r"^model\.", ""),
            (r"attn\.norm", "attn.kv_norm"),
        ),
    ),
    "longcat_flash": Family(
        name="LongcatFlash",
        sizes={
            **MLA, **ROUTED, "num_layers": LAYERS, "head_dim": 32, "moe_topk": 2, "zero_expert_num": 4,
            "ffn_hidden_size": 256, "expert_ffn_hidden_size": 128,
        },
        without=("num_hidden_layers", "num_experts_per_tok", "intermediate_size", "n_shared_experts"),
    ),
}  # fmt: skip
"""``model_type``, and a form on disk where there are two → how to make it."""


def _settle(model: Any) -> None:
    """Give the parameters that a class leaves at zero or empty small values, so that nothing is not finite."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.is_meta or "inv_freq" in name:
                continue
            if name.endswith(("bias", "scale", "sinks")) or not bool(torch.isfinite(tensor).all()):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.1)


def classes(name: str) -> tuple[Any, Any]:
    """Return a family's config, as transformers' object, and the class of its model.

    Raises:
        AttributeError: the installed transformers has no such class.
    """
    import transformers

    family = FAMILIES[name]
    sizes = {key: value for key, value in {**BASE, **family.sizes}.items() if key not in family.without}
    if family.vision is not None:
        sizes = {
            "text_config": sizes,
            "vision_config": dict(family.vision),
            "tie_word_embeddings": False,
            **family.around,
        }
        if family.wrapper is not None:
            sizes["text_config"]["vocab_size"] += wrappers.PLACES
            sizes |= family.wrapper.config()
    config = getattr(transformers, f"{family.name}Config")(**sizes)
    return config, getattr(transformers, family.called or f"{family.name.removesuffix('Text')}{family.model}")


def _as_published(config: dict[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what published ones say; parts within it are merged."""
    parts = {key: {**config[key], **it} for key, it in published.items() if isinstance(it, dict) and key in config}
    return {**config, **published, **parts}


def config_json(name: str) -> dict[str, Any]:
    """Return a family's config.json."""
    config, model = classes(name)
    said = {**json.loads(config.to_json_string()), "architectures": [model.__name__]}
    return _as_published(said, FAMILIES[name].published)


def build(name: str, folder: Path) -> Any:
    """Write the checkpoint of a family and return transformers' class of its model.

    Raises:
        AttributeError: the installed transformers has no such class.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    family = FAMILIES[name]
    config, kind = classes(name)
    model = kind(config)
    _settle(model.to(torch.bfloat16).eval())
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(_as_published(json.loads(path.read_text()), family.published)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    if family.wrapper is not None:
        family.wrapper.write(folder)
    if family.convert is not None:
        weights = folder / "model.safetensors"
        save_file(family.convert(load_file(weights)), weights, metadata={"format": "pt"})
    return kind

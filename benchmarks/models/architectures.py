"""The small models that can be trained."""

from __future__ import annotations

from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from benchmarks.models.fit import SEQUENCE

LARGE = "mixtral-200m"
NAMES = ("mixtral", "qwen3-moe", LARGE)

SHARED = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": SEQUENCE,
    "rms_norm_eps": 1e-5,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def architecture(name: str) -> PreTrainedConfig:
    """Return the configuration of one of the two small models, or of the larger one (170 M parameters)."""
    if name == LARGE:
        larger = {"vocab_size": 8192, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64}
        return MixtralConfig(
            **{**SHARED, **larger, "num_key_value_heads": 4},
            num_hidden_layers=12,
            intermediate_size=1024,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    if name == "mixtral":
        return MixtralConfig(
            **{**SHARED, "hidden_size": 256, "head_dim": 64},
            num_hidden_layers=7,
            intermediate_size=128,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    return Qwen3MoeConfig(
        **SHARED,
        num_hidden_layers=2,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )

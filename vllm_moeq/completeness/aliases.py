"""Keys of config.json that must agree: transformers reads some of them, vLLM others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_moeq.completeness.sizes import parts
from vllm_moeq.format import EXPERT_COUNT, ConfigError, MoeqConfig

ALIASES = {
    "num_key_value_heads": ("n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups"),
    "head_dim": ("hidden_size_per_head",),
}
"""Key → those that vLLM reads in its place, some of them before it."""

LENGTHS = (
    "max_seq_len", "max_seq_length", "max_sequence_length", "model_max_length", "n_positions", "seq_len", "seq_length",
)  # fmt: skip
"""The keys by which vLLM finds the longest sequence, besides ``max_position_embeddings``."""


TWO_STACKS = "is_encoder_decoder"


def check_aliases(config: Mapping[str, Any], parsed: MoeqConfig, path: Path) -> None:
    """Refuse a config that says one thing to transformers and another to vLLM.

    Args:
        config: contents of config.json.
        parsed: its quantization_config.
        path: config.json, for messages.

    Raises:
        ConfigError: naming the key.
    """
    if not config.get("architectures"):
        raise ConfigError(f"{path}: architectures: expected the name of the model's class, which vLLM builds")
    most = max(map(len, parsed.experts.values()))
    encoder = any("encoder" in prefix.split(".") for prefix in parsed.experts)
    for part in parts(config):
        for key in EXPERT_COUNT:
            if isinstance(part.get(key), int) and part[key] > most:
                raise ConfigError(f"{path}: {key}: expected {most} experts, found {part[key]!r:.40}")
        if part.get(TWO_STACKS, encoder) is not encoder:
            raise ConfigError(f"{path}: {TWO_STACKS}: expected {encoder}, found {part[TWO_STACKS]!r:.40}")
        for key, others in ALIASES.items():
            for other in others:
                value = part.get(other)
                if value is not None and value != part.get(key):
                    raise ConfigError(
                        f"{path}: {other}: expected no such key, or the value of {key}, found {value!r:.40}"
                    )
        _check_lengths(part, path)
        _check_windows(part, path)


def _check_lengths(part: Mapping[str, Any], path: Path) -> None:
    """Refuse another longest sequence beside ``max_position_embeddings``."""
    longest = part.get("max_position_embeddings")
    for key in LENGTHS if longest is not None else ():
        if part.get(key) not in (None, longest):
            raise ConfigError(f"{path}: {key}: expected no such key, or {longest!r:.40}, found {part[key]!r:.40}")


def _check_windows(part: Mapping[str, Any], path: Path) -> None:
    """Refuse layers that look at a window when the config says that there is none."""
    kinds, window = part.get("layer_types"), part.get("sliding_window", 1)
    if isinstance(kinds, list) and "sliding_attention" in kinds and not window:
        raise ConfigError(f"{path}: sliding_window: expected a positive number for layer_types, found {window!r:.40}")

"""Check the sizes in a config.json before a model is built from them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_moeq.format import EXPERT_COUNT, NESTED, ConfigError

MAX_INTEGER = 1 << 20
"""Largest size that a config.json may name. A larger one means a damaged file, and would cause long loops."""

MAX_DEPTH = 256
"""Largest number of layers of any part of a model: twice the largest published, and 4 s to build without weights."""

SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
"""Sizes that config.json must name if transformers' config class has them: the class's defaults fit another model."""


def parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a config, and the part of its language model if it has one."""
    return [part for part in (config, config.get(NESTED)) if isinstance(part, Mapping)]


def positive_integer(config: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> int:
    """Return the first positive integer under one of ``keys`` in a config, else in its language model's config.

    Args:
        config: contents of config.json.
        keys: the keys to try, in this order.
        path: config.json, for messages.

    Raises:
        ConfigError: no key has a positive integer of at most :data:`MAX_INTEGER`.
    """
    for found in parts(config):
        for key in keys:
            value = found.get(key)
            if isinstance(value, list) and value and all(type(one) is int and one == value[0] for one in value):
                value = value[0]  # as of each layer, the same
            if type(value) is int and 0 < value <= MAX_INTEGER:
                return value
    raise ConfigError(f"{path}: expected a positive integer {' or '.join(keys)} of at most {MAX_INTEGER}")


def check_sizes(config: Mapping[str, Any], parsed: Any, path: Path) -> None:
    """Refuse a config that lacks a size of its class, or counts too many layers.

    Args:
        config: contents of config.json.
        parsed: transformers' config object made from it.
        path: config.json, for messages.

    Raises:
        ConfigError: naming the key.
    """
    for size in SIZES:
        # Where the class computes a size from others, as LongCat does, config.json need not have it.
        if hasattr(parsed, size) and not isinstance(getattr(type(parsed), size, None), property):
            positive_integer(config, (parsed.attribute_map.get(size, size),), path)
    positive_integer(config, EXPERT_COUNT, path)


TOP_K = ("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts", "experts_per_token")
"""The keys of config.json that may say how many experts a token has."""


def check_top_k(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a number of experts per token that no router can choose.

    Args:
        config: contents of config.json.
        path: config.json, for messages.

    Raises:
        ConfigError: naming the key.
    """
    experts = positive_integer(config, EXPERT_COUNT, path)
    for found in parts(config):
        values = {key: found[key] for key in TOP_K if key in found}
        for key, value in values.items():
            each = value if isinstance(value, list) and value else [value]
            unsaid = value is None and any(other is not None for other in values.values())
            if not unsaid and not all(type(one) is int and 0 < one <= experts for one in each):
                raise ConfigError(f"{path}: {key}: expected 1 to {experts} experts per token, found {value!r:.40}")


LAYER_COUNT = re.compile(r"(^|\.)(num_(\w+_)?layers|n_layers?|depth|(en|de)coder_layers)$")
"""The keys of config.json that say how many layers a part of a model has."""


def check_layer_counts(config: Mapping[str, Any], path: Path, most: int = MAX_DEPTH) -> None:
    """Refuse more layers than a model may have, because building them would take memory and time.

    Args:
        config: contents of config.json, of bounded depth.
        path: config.json, for messages.
        most: largest number of layers of any part of the model.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in numbers(config):
        if not 0 <= value <= most and LAYER_COUNT.search(key):
            raise ConfigError(f"{path}: {key}: expected 0 to {most} layers, found {value!r:.40}")


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield (dotted key, number) for all numbers, also within objects and lists."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from numbers(child, f"{place}.{key!s:.80}".removeprefix("."))
    elif isinstance(value, list):
        for child in value:
            if isinstance(child, int | float):
                yield place, child
            else:
                yield from numbers(child, place)
    elif isinstance(value, int | float):
        yield place, value

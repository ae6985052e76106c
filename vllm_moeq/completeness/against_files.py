"""Compare what a config.json says with the files, by the format's own facts: transformers is not asked.

Its classes take 100 MiB to be imported, and would say the same later.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_moeq.completeness.aliases import check_aliases
from vllm_moeq.completeness.sizes import MAX_DEPTH, check_layer_counts, check_top_k, parts
from vllm_moeq.format import CheckpointError, ConfigError, MoeqConfig, ShardSet

FIRST_NUMBER = re.compile(r"([^\d]*)\.(\d+)\.")
"""The beginning of a tensor's name, when it is in a numbered layer: the stack, and the layer's index."""

OF_A_LAYER = re.compile(r"((?:language_model\.)?model\.(?:language_model\.)?layers\.(\d+)\.)")
"""The beginning of an experts' prefix in the stack that ``num_hidden_layers`` counts, and the layer's index."""

EMBEDDINGS = (
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
)
"""Names of the embedding of tokens, of shape [vocab_size, hidden_size]."""

MANY_EXPERTS = 32768
"""Experts of all layers that any config may describe; above, files must hold a quarter of what it describes."""


def check_against_files(shards: ShardSet, config: dict[str, Any], parsed: MoeqConfig, path: Path) -> None:
    """Compare the sizes in config.json with the files, before a model of them is built.

    Args:
        shards: the checkpoint.
        config: contents of config.json.
        parsed: its quantization_config.
        path: config.json, for messages.

    Raises:
        CheckpointError: naming a tensor that does not fit.
        ConfigError: naming the key.
    """
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path}: model_type: expected the name of an architecture, found none")
    check_aliases(config, parsed, path)
    check_top_k(config, path)
    layers = min(_count_layers(shards), MAX_DEPTH)
    check_layer_counts(config, path, layers)
    experts = [len(widths) for widths in parsed.experts.values()]
    if layers * max(experts) > max(MANY_EXPERTS, 4 * sum(experts)):
        raise ConfigError(f"{path}: {layers} layers of {max(experts)} experts: expected files for them, found a few")
    _check_numbers_of_layers(shards, config, parsed)
    _check_embedding(shards, config)
    _check_last_norm(shards, config, parsed)


def _check_numbers_of_layers(shards: ShardSet, config: dict[str, Any], parsed: MoeqConfig) -> None:
    """Refuse experts of a layer that the model does not have.

    Raises:
        CheckpointError: naming the first tensor of such a layer.
    """
    count = size(config, "num_hidden_layers")
    for prefix in parsed.experts:
        found = OF_A_LAYER.match(prefix)
        if found is not None and count is not None and int(found[2]) >= count:
            name = next(name for name in shards.tensors if name.startswith(found[1]))
            raise CheckpointError(
                f"{shards.place(name)}: expected no such tensor, as config.json has num_hidden_layers {count}, "
                f"found {list(shards.info(name).shape)}"
            )


def _check_embedding(shards: ShardSet, config: dict[str, Any]) -> None:
    """Refuse an embedding of tokens that has another shape than config.json says.

    Raises:
        CheckpointError: naming it.
    """
    expected = [size(config, "vocab_size"), size(config, "hidden_size")]
    for name in EMBEDDINGS if None not in expected else ():
        info = shards.tensors.get(name)
        if info is not None and list(info.shape) != expected:
            raise CheckpointError(
                f"{shards.place(name)}: expected {expected}, as vocab_size and hidden_size of config.json say, "
                f"found {list(info.shape)}"
            )


def _check_last_norm(shards: ShardSet, config: dict[str, Any], parsed: MoeqConfig) -> None:
    """Require the norm behind the layers: a vector beside the list of layers that has experts, whatever its name.

    It may be part of a module there, whose name then says that it is a norm.

    Raises:
        CheckpointError: there is none.
    """
    hidden = size(config, "hidden_size") or size(config, "d_model")
    first = next(filter(None, map(FIRST_NUMBER.match, parsed.experts)), None)
    if hidden is None or first is None:
        return
    around = first[1].rpartition(".")[0]
    beside = f"{around}." if around else ""
    for name, info in shards.tensors.items():
        own = name.removeprefix(beside)
        if not name.startswith(beside) or len(info.shape) != 1 or name.startswith(f"{first[1]}."):
            continue
        if own.count(".") == 1 or own.endswith("norm.weight"):
            return
    raise CheckpointError(
        f"{shards.folder}: tensor {beside}norm.weight is missing: expected [{hidden}] for the norm behind {first[1]}, "
        "found no vector of any name there"
    )


def size(config: dict[str, Any], key: str) -> int | None:
    """Return a size of the language model, or None if config.json does not say it."""
    for part in reversed(parts(config)):
        if type(part.get(key)) is int:
            return int(part[key])
    return None


def _count_layers(shards: ShardSet) -> int:
    """Return the number of layers of the deepest stack in the files."""
    stacks: dict[str, set[str]] = {}
    for name in shards.tensors:
        found = FIRST_NUMBER.match(name)
        if found is not None:
            stacks.setdefault(found[1], set()).add(found[2])
    return max(map(len, stacks.values()), default=0)

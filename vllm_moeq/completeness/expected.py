"""The tensors that a model of a config.json has: transformers' class, built on the meta device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.completeness.classes import MOST_MODULES, cannot_build, meta_model, silence
from vllm_moeq.format import TensorInfo

LEFTOVERS = (r"\.rotary_emb\.inv_freq$", r"\.(q|k|v|kv|prob)_scale$")
"""Patterns of tensors that other tools leave in checkpoints of any architecture, and no model reads: frequencies that
follow from the config, and scales of a key/value cache in eight bits."""

PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    "kimi_k25": (
        (r"^(language_model\..*)\.blocks\.", r"\1.layers."),
        (r"^model\.mm_projector\.", "mm_projector."),
        (r"^vision_tower\.encoder\.patch_embed\.", "vision_tower.patch_embed."),
    ),
    "kimi_linear": ((r"\.block_sparse_moe\.((?:gate|up|down)_proj)\.", r".mlp.\1."),),
    "minimax_m3_vl": ((r"\.block_sparse_moe\.((?:gate|up|down)_proj)\.", r".mlp.\1."),),
    "deepseek_v4": (
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.hc_head\.hc_", "hc_head_"),
        (r"^model\.", ""),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    ),
}
"""``model_type`` → (pattern, replacement) of names for which transformers' renamings, read backwards, are not those of
published files: there two names lead to one module."""


@dataclass(frozen=True)
class Expected:
    """The tensors of a model, under the names that a published checkpoint has.

    Attributes:
        class_name: name of transformers' class.
        tensors: name → shape and dtype, in the model's order.
        tied: name → name in ``tensors`` of the same weight; a file may hold it or not.
        optional: patterns of names that a file may lack.
        ignored: patterns of names that a file may have besides, such as layers for speculative decoding.
    """

    class_name: str
    tensors: Mapping[str, TensorInfo]
    tied: Mapping[str, str]
    optional: tuple[str, ...]
    ignored: tuple[str, ...]


def expected_tensors(config: Mapping[str, Any], path: Path, most: int = MOST_MODULES) -> Expected:
    """Return the tensors of a model, from its config alone. No weights are allocated.

    Args:
        config: contents of config.json, with a class (see :func:`no_class`). Without a dtype, weights are bfloat16.
        path: config.json, for messages.
        most: largest number of the model's modules and parameters.

    Raises:
        ConfigError: config.json lacks a size, or transformers cannot build its model.
    """
    model = meta_model(config, path, most)
    try:
        with silence():
            return _of_model(model, path.name)
    except Exception as error:  # transformers' conversions of a model of unusual sizes may raise anything
        raise cannot_build(path, error) from None


def saved(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of transformers' model under the names, and in the form, that a published checkpoint has.

    Args:
        model: transformers' model.
        tensors: name in the model → tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return {_published(model.config.model_type, name): tensor for name, tensor in found.items()}


def _published(model_type: str, name: str) -> str:
    for pattern, replacement in PUBLISHED.get(model_type, ()):
        name = re.sub(pattern, replacement, name)
    return name


def _of_model(model: Any, file: str) -> Expected:
    """Return a model's tensors under the checkpoint's names; weights that are tied stand in ``tensors`` once."""
    state: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) == name:
            state[name] = tensor.detach()
        else:
            tied[name] = first[id(tensor)]

    def saved_name(name: str, weight: str) -> str:
        return next(iter(saved(model, {name: state[weight]})))

    found = saved(model, state)
    return Expected(
        type(model).__name__,
        {name: TensorInfo(file, tuple(tensor.shape), tensor.dtype, 0) for name, tensor in found.items()},
        {saved_name(name, weight): saved_name(weight, weight) for name, weight in tied.items()},
        tuple(model._keys_to_ignore_on_load_missing or ()),
        (*LEFTOVERS, *(model._keys_to_ignore_on_load_unexpected or ())),
    )


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether one of the regular expressions is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)

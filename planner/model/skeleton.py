"""A model from its config.json alone: names, shapes and dtypes of its tensors without the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from planner.model.hub import resolve_model
from planner.model.layout import architecture_of
from planner.model.source import SourceModel
from planner.model.tensors import SourceTensors
from vllm_moeq.format import (
    EXPERT_COUNT,
    CheckpointError,
    ConfigError,
    TensorInfo,
    UsageError,
    read_json,
)
from vllm_moeq.format.shards import INDEX_NAME, SINGLE_NAME
from vllm_moeq.format.tensors import Tensors

CONFIG = "config.json"

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


class _Headers(Tensors):
    """Headers of the tensors that a checkpoint would have. There are no files to read."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.tensors = dict(tensors)

    def load(self, name: str) -> torch.Tensor:
        """Refuse to read."""
        raise CheckpointError(f"{self.folder}: expected weights, found {CONFIG} alone")

    def map(self, name: str, index: int | None = None) -> torch.Tensor:
        """Refuse to read."""
        return self.load(name)

    def read_rows(self, name: str, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Refuse to read."""
        return self.load(name)


class ConfigModel(SourceModel):
    """A folder with a config.json and no weights. It knows the names, shapes and dtypes of the tensors.

    transformers builds the model on the meta device (no memory, well below a second); tensors get their checkpoint
    names. If the config names no dtype, weights are bfloat16.

    Raises:
        ConfigError: config.json is no JSON object, lacks a size, or transformers cannot build its model.
        UsageError: an unknown ``model_type``, or transformers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise ConfigError(f"{folder / CONFIG}: expected an object, found {type(config).__name__}")
        self.folder = folder
        self.config = config
        self.shards = _Headers(folder, {})
        architecture_of(self)
        self.shards = SourceTensors(folder, config, _Headers(folder, _tensors(_skeleton(self))))

    def fingerprint(self) -> str:
        """Return a digest of the config."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()


def open_model(model: str, dry_run: bool) -> SourceModel:
    """Open a model by its folder or Hub name. A dry run downloads no weights and can do with config.json alone.

    Raises:
        MoeqError: see :func:`resolve_model`, :class:`SourceModel` and :class:`ConfigModel`.
    """
    return open_folder(resolve_model(model, weights=not dry_run), dry_run)


def open_folder(folder: Path, dry_run: bool) -> SourceModel:
    """Open a folder. A dry run can do without weights: config.json is enough.

    Raises:
        MoeqError: see :class:`SourceModel` and :class:`ConfigModel`.
    """
    if dry_run and not (folder / INDEX_NAME).exists() and not (folder / SINGLE_NAME).exists():
        return ConfigModel(folder)
    return SourceModel(folder)


def model_class(config: Any) -> Any:
    """Return transformers' class for a config: the class that it names, else its causal language model."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _skeleton(model: SourceModel) -> torch.nn.Module:
    """Build transformers' model on the meta device."""
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise UsageError(f"sizes from config.json alone need {error.name}: pip install 'vllm-moeq[eval]'") from None
    try:
        config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False, local_files_only=True)
        for size in SIZES:
            if hasattr(config, size):
                model.integer(config.attribute_map.get(size, size))
        model.integer(*EXPERT_COUNT)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
        with torch.device("meta"):
            skeleton: torch.nn.Module = model_class(config)._from_config(config, dtype=dtype)
    except ConfigError:
        raise
    except Exception as error:  # the config may hold anything, and transformers raises whatever it meets first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{model.folder / CONFIG}: transformers cannot build the model ({reason})") from None
    return skeleton


def _tensors(skeleton: torch.nn.Module) -> dict[str, TensorInfo]:
    """Return checkpoint name → shape and dtype. Tied weights appear once, as in checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    saved = revert_weight_conversion(skeleton, state)
    return {name: TensorInfo(CONFIG, tuple(tensor.shape), tensor.dtype, 0) for name, tensor in saved.items()}

"""A model from its config.json alone: names, shapes and dtypes of its tensors without the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from planner.common.install import require
from planner.model.hub import resolve_model
from planner.model.layout import architecture_of
from planner.model.source import CONFIG, SourceModel, read_config
from planner.model.tensors import SourceTensors
from vllm_moeq.completeness import expected_tensors, no_class
from vllm_moeq.format import CheckpointError, TensorInfo, UsageError
from vllm_moeq.format.shards import INDEX_NAME, SINGLE_NAME
from vllm_moeq.format.tensors import Tensors


class SkeletonTensors(Tensors):
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

    transformers builds the model on the meta device (no memory, well below a second); tensors have their checkpoint
    names. If the config names no dtype, weights are bfloat16.

    Raises:
        ConfigError: config.json is no JSON object, lacks a size, or transformers cannot build its model.
        UsageError: an unknown ``model_type``, or transformers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        self.folder = folder
        self.config = config
        self.shards = SkeletonTensors(folder, {})
        architecture_of(self)
        require("sizes from config.json alone", ("transformers",), "hf")
        reason = no_class(config)
        if reason is not None:
            raise UsageError(f"sizes from config.json alone: {reason}")
        self.expected = expected_tensors(config, folder / CONFIG)
        self.shards = SourceTensors(folder, config, SkeletonTensors(folder, self.expected.tensors), decode=False)

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

"""The hooks that transformers calls while it loads a checkpoint of this project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from vllm_moeq.completeness import verify_whole
from vllm_moeq.format import LINEAR_SUFFIXES, CheckpointError, MoeqConfig, ShardSet, UsageError
from vllm_moeq.format.strangers import NOT_ALONE
from vllm_moeq.hf.config import MoeqQuantizationConfig
from vllm_moeq.hf.experts import RoutedExperts, packed_experts
from vllm_moeq.hf.layout import StoredLayer, read_layers
from vllm_moeq.hf.linears import ELSEWHERE, conversions
from vllm_moeq.hf.names import Names

WORDS = LINEAR_SUFFIXES[0]

logger = logging.get_logger("transformers.moeq")  # below "transformers": other names are not configured


class MoeqHfQuantizer(HfQuantizer):
    """Transformers' quantizer for ``moeq``: it replaces the experts by packed ones, and fills them at the end.

    Transformers renames, places and casts all other tensors. It cannot join experts of different widths, so this class
    reads the experts itself, directly into their buffers on their device.
    """

    def __init__(self, quantization_config: MoeqQuantizationConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.config: MoeqConfig = quantization_config.moeq
        self.dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._folder = Path()
        self._checked: Path | None = None

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        """Refuse to quantize an ordinary model.

        Raises:
            UsageError: the model is not one of this project's checkpoints.
        """
        if not self.pre_quantized:
            raise UsageError("expected a checkpoint that `moeq quantize` wrote: transformers cannot quantize to it")

    def update_attn_implementation(self, config: Any) -> Any:
        """Check a folder's headers, before transformers reads the index and the shards.

        Of the hooks that know the folder, this is the only one that every supported version of transformers calls
        before it opens a shard. Nothing is done to the attention. Transformers is not alone here, so the keys that
        tell it so are taken away.

        Raises:
            MoeqError: the checkpoint is damaged.
        """
        if config.name_or_path and Path(config.name_or_path).is_dir():
            self._check(Path(config.name_or_path))
        for key in NOT_ALONE.keys() & vars(config).keys():
            delattr(config, key)
        return super().update_attn_implementation(config)

    def _check(self, folder: Path) -> None:
        if self._checked != folder:
            summary = verify_whole(folder, values=False)
            self._checked = folder
            if summary.only_experts is not None:
                logger.warning(f"only experts were checked for completeness: {summary.only_experts}")

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **options: Any) -> None:
        """See :class:`transformers.quantizers.base.HfQuantizer`; here the dtype is remembered too."""
        super().preprocess_model(model, dtype=dtype, **options)
        self._note(model, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Check the checkpoint's headers, and replace the experts of every MoE layer.

        Raises:
            MoeqError: the checkpoint is damaged, or does not fit the model.
        """
        if not checkpoint_files:
            raise UsageError("expected the folder of a checkpoint: its experts cannot come from a state_dict")
        # Do not resolve the path: files in the Hub's cache are links into another folder.
        self._folder = Path(checkpoint_files[0]).parent
        self._check(self._folder)
        names = Names(model)
        with ShardSet(self._folder) as shards:
            layers = list(read_layers(shards, self.config))
            prefixes = tuple(f"{layer.prefix}." for layer in layers)
            packed = [name for name in shards.tensors if name.endswith(f".{WORDS}") and not name.startswith(prefixes)]
        names.require_whole(f"{name.removesuffix(WORDS)}weight" for name in packed)
        _replace(model, {names.module(layer.prefix): layer for layer in layers})
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"(^|\.){re.escape(ELSEWHERE)}$",
        }

    def _note(self, model: Any, dtype: torch.dtype | None) -> None:
        """Remember the shapes and dtypes that parameters must have.

        For a quantized model transformers does not check them: it keeps the file's shapes, and the file's dtype for
        renamed tensors.
        """
        for name, tensor in model.state_dict().items():
            self._shapes[name], self.dtypes[name] = tensor.shape, tensor.dtype
        plan = model._get_dtype_plan(dtype)
        for name in self.dtypes:
            for pattern, kept in plan.items():
                if re.search(pattern.replace("*", ".*"), name):
                    self.dtypes[name] = kept

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any, **__: Any) -> list[Any]:
        """Return our renamings and conversions, then transformers'; newer versions pass the model too."""
        return conversions(self.config, self.dtypes) + weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Check and cast what transformers loaded, and read the experts.

        Raises:
            CheckpointError: a tensor is missing, misshapen or not finite.
        """
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, shape in self._shapes.items():
            tensor = tensors.get(name)
            if tensor is None:
                continue  # a tied weight, there under another name
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{self._folder}: tensor {name}: expected {list(shape)}, found {list(tensor.shape)}"
                )
            if tensor.is_floating_point() and tensor.dtype != self.dtypes[name]:
                tensor.data = tensor.data.to(self.dtypes[name])
        with ShardSet(self._folder) as shards:
            for module in model.modules():
                if isinstance(module, RoutedExperts):
                    module.load(shards)
        model.requires_grad_(False)

    def is_serializable(self) -> bool:
        """Return False: the checkpoint's folder is the only form of the packed experts."""
        logger.warning("a moeq model cannot be saved: copy the checkpoint's folder instead")
        return False

    @property
    def is_trainable(self) -> bool:
        """Return False: codes have no gradients."""
        return False


def _replace(model: Any, layers: dict[str, StoredLayer]) -> None:
    """Replace the modules at these paths by packed experts.

    Raises:
        MoeqError: a module does not hold experts that are known here, or the checkpoint lacks a layer's experts.
    """
    replaced = set()
    for path, layer in layers.items():
        parent_path, _, name = path.rpartition(".")
        parent: Any = model.get_submodule(parent_path)
        source = model.get_submodule(path)
        replaced.add(type(source))
        packed: Any = packed_experts(layer, source)
        setattr(parent, name, packed)
        # Some models initialize experts through the block that holds them; neither has anything to initialize now.
        packed._is_hf_initialized = parent._is_hf_initialized = True
    for path, module in model.named_modules():
        if type(module) in replaced:
            raise UsageError(f"quantization_config.experts names no experts for transformers' {path}")

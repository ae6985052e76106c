"""Give modules of a network their weights from the checkpoint, and take them away again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from planner.model.source import SourceModel
from vllm_moeq.completeness import saved
from vllm_moeq.format import CheckpointError
from vllm_moeq.format.schemes import check_finite


class Weights:
    """The weights of a network in a checkpoint.

    Args:
        model: the checkpoint.
        whole: transformers' model, whose parameters have no storage.
        device: device of the weights.
        dtype: dtype of the weights.
    """

    def __init__(self, model: SourceModel, whole: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.whole, self.device, self.dtype = model, whole, device, dtype
        self._shapes = {name: tensor.detach() for name, tensor in whole.state_dict(keep_vars=True).items()}
        self._names = {id(module): name for name, module in whole.named_modules()}

    def fill(
        self,
        module: torch.nn.Module,
        checkpoint_name: Callable[[str], str] | None = None,
        replaced: Mapping[str, torch.Tensor] | None = None,
        skip: Collection[int] = (),
        tied: str | None = None,
    ) -> None:
        """Load the weights of a module's parameters and persistent buffers.

        Args:
            module: the module.
            checkpoint_name: returns a parameter's name in the checkpoint; None to ask transformers' table of renamings.
            replaced: weights to use instead of the checkpoint's, by checkpoint name.
            skip: ids of tensors to leave alone.
            tied: name of the module whose weight is the module's where the checkpoint lacks its own.

        Raises:
            CheckpointError: a tensor that transformers expects is missing or has another shape.
        """
        full = self._names.get(id(module), "")
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in skip:
                continue
            path = f"{full}.{name}".removeprefix(".")
            sources = self._sources(path) if checkpoint_name is None else (checkpoint_name(name),)
            if tied is not None and name == "weight" and sources[0] not in self.model.shards.tensors:
                sources = self._sources(f"{tied}.weight")
            value = self._read(path, sources, replaced or {}, tensor.shape)
            owner, _, leaf = name.rpartition(".")
            value = value.to(self.device, self.dtype if value.dtype.is_floating_point else None)
            if isinstance(tensor, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=False)
            setattr(module.get_submodule(owner), leaf, value)

    def empty(self, module: torch.nn.Module) -> None:
        """Take the weights away; buffers that no checkpoint has stay, as nothing could bring them back."""
        for name, tensor in module.state_dict(keep_vars=True).items():
            owner, _, leaf = name.rpartition(".")
            bare = torch.empty_like(tensor, device="meta", requires_grad=False)
            setattr(
                module.get_submodule(owner),
                leaf,
                torch.nn.Parameter(bare, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else bare,
            )

    def _sources(self, path: str) -> tuple[str, ...]:
        """Return the names in the checkpoint of the tensors that make up one of the network's."""
        return tuple(saved(self.whole, {path: self._shapes[path].to("meta")}))

    def _read(
        self, path: str, sources: tuple[str, ...], replaced: Mapping[str, torch.Tensor], shape: torch.Size
    ) -> torch.Tensor:
        """Return a tensor, joined where the checkpoint has its parts.

        Raises:
            CheckpointError: it is missing, is not finite, or has another shape.
        """
        known = self.model.shards.tensors
        if any(source not in known and source not in replaced for source in sources):
            sources = self._sources(path)
        parts = [replaced[it] if it in replaced else self._finite(it) for it in sources]
        value = parts[0]
        if len(parts) > 1:
            sums = [sum(part.shape[axis] for part in parts) for axis in range(value.ndim)]
            axis = next((axis for axis, total in enumerate(sums) if total == shape[axis]), 0)
            value = torch.cat(parts, dim=axis)
        if value.shape != shape:
            raise CheckpointError(
                f"{self.model.folder}: tensor {sources[0]}: expected {list(shape)}, found {list(value.shape)}"
            )
        return value

    def _finite(self, name: str) -> torch.Tensor:
        """Return a tensor of the checkpoint; refuse NaN and infinity, which would show far from here."""
        value = self.model.shards.map(name)
        if value.is_floating_point() and value.dtype.itemsize > 1 and not bool(torch.isfinite(value.sum())):
            check_finite(value, self.model.shards.place(name), math.inf)
        return value

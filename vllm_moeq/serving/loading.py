"""Load a checkpoint's expert tensors into this rank's ragged buffers, and notice missing ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vllm_moeq.format import CODES_PER_BLOCK, WHOLE_ROW, CheckpointError, MoeqConfig, Rotated, Scheme, UsageError
from vllm_moeq.format.slices import check_ranks
from vllm_moeq.kernels import RaggedMatrices, ragged, wide_enough
from vllm_moeq.serving.checkpoint import Checkpoint

WeightLoader = Callable[..., bool | None]


@dataclass(frozen=True)
class Partition:
    """This rank's share of one layer: some experts (EP), and a slice of the intermediate dimension (TP).

    Attributes:
        prefix: the layer's name in the checkpoint.
        config: the checkpoint's configuration.
        widths: the width of each global expert.
        local_experts: global indices of this rank's experts, in local order.
        hidden: hidden size.
        intermediate: intermediate size on this rank.
        rank: index of this rank's slice of the intermediate dimension.
        ranks: number of slices.
        schemes: the scheme of each global expert; None takes them from the configuration.
    """

    prefix: str
    config: MoeqConfig
    widths: tuple[int, ...]
    local_experts: tuple[int, ...]
    hidden: int
    intermediate: int
    rank: int
    ranks: int = 1
    schemes: tuple[Scheme, ...] | None = None

    @property
    def stacked(self) -> int:
        """How many projections w13 holds: gate and up, or up alone."""
        return len(self.config.projections.names()) - 1

    @property
    def begin(self) -> int:
        """The first intermediate neuron of this rank."""
        return self.rank * self.intermediate

    @property
    def local_widths(self) -> tuple[int, ...]:
        """The width of each local expert."""
        return tuple(self.widths[expert] for expert in self.local_experts)

    @cached_property
    def local_schemes(self) -> tuple[Scheme, ...]:
        """The scheme of each local expert."""
        own = self.schemes
        return tuple(own[it] if own else self.config.scheme(self.prefix, it) for it in self.local_experts)

    def rotated(self, part: str) -> Rotated | None:
        """Return the rotation of the inputs of ``w13`` or ``w2``."""
        names = self.config.projections
        return self.config.rotated(self.prefix, names.gate if part == "w13" else names.down)

    @cached_property
    def w13(self) -> RaggedMatrices:
        """The layout of gate and up, or of up alone; ranks split their rows, so groups stay whole.

        Raises:
            UsageError: see :attr:`w2`.
        """
        check_ranks(self.prefix, self.intermediate * self.ranks, self.local_schemes, self.rotated("w2"), self.ranks)
        return ragged(
            self.local_widths,
            self.stacked * self.intermediate,
            self.hidden,
            self.config.group_size,
            schemes=self.local_schemes,
        )

    @cached_property
    def w2(self) -> RaggedMatrices:
        """The layout of down; ranks split its input dimension, maybe inside a group.

        Raises:
            UsageError: a scheme or the rotation cannot be split there; the grid can be between blocks of 32 codes.
        """
        check_ranks(self.prefix, self.intermediate * self.ranks, self.local_schemes, self.rotated("w2"), self.ranks)
        size = self.config.group_size
        offset = 0 if size == WHOLE_ROW else self.begin % size
        return ragged(self.local_widths, self.hidden, self.intermediate, size, offset, self.local_schemes)


class ExpertLoader:
    """The loader of one layer's tensors; it checks and counts them.

    Args:
        partition: this rank's share of the layer.
        checkpoint: the tensors' checkpoint. It is checked before the first tensor is loaded, and messages name it.
    """

    def __init__(self, partition: Partition, checkpoint: Checkpoint | None = None) -> None:
        self.partition = partition
        self._checkpoint = checkpoint
        self._local = {expert: local for local, expert in enumerate(partition.local_experts)}
        names = partition.config.projections
        found = {"w1": names.gate, "w3": names.up, "w2": names.down}
        self._projection = {shard: name for shard, name in found.items() if name is not None}
        self._loaded: set[str] = set()
        self._closed = False

    def sign_loader(self, shard_id: str) -> WeightLoader:
        """Return the callback with which vLLM loads a layer's signs; ``shard_id`` is w13 or w2.

        They stand beside the first expert's matrices, but belong to all experts, on every rank.
        """
        own = self.partition

        def load(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, *_: Any, **options: Any
        ) -> bool:
            rotated = own.rotated(shard_id)
            if rotated is None or loaded_weight.dtype != torch.int32:
                raise CheckpointError(f"{weight_name} belongs to no expert of the config")
            self._admit(rotated.name)
            words = loaded_weight
            if shard_id == "w2":
                words = words[own.begin // CODES_PER_BLOCK : (own.begin + own.intermediate) // CODES_PER_BLOCK]
            if words.shape != param.shape:
                raise CheckpointError(
                    f"{self._place(rotated.name)}: expected {list(param.shape)} on this rank, found {list(words.shape)}"
                )
            param.data.copy_(words)
            self._loaded.add(rotated.name)
            return True

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def close(self) -> None:
        """Refuse all further tensors: a kernel has its own copy of the experts."""
        self._closed = True

    def loader_for(self, suffix: str) -> WeightLoader:
        """Return the callback with which vLLM loads the tensors of one suffix."""

        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = self._local.get(expert_id)
            if local is not None:
                name = f"{self.partition.prefix}.{expert_id}.{self._projection[shard_id]}.{suffix}"
                self._load(param, loaded_weight, name, suffix, shard_id, local)
            return local is not None if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def _load(
        self, param: torch.nn.Parameter, tensor: torch.Tensor, name: str, suffix: str, shard_id: str, local: int
    ) -> None:
        self._admit(name)
        matrices = self.partition.w2 if shard_id == "w2" else self.partition.w13
        scheme = matrices.schemes[local]
        part = tensor[self._share(tensor, name, suffix, shard_id, local)]
        if suffix in scheme.checked:
            self._check_values(part, scheme, name, suffix)
        param.data = wide_enough(param.data, part)
        target = matrices.view(param.data, suffix, local)
        if shard_id != "w2":
            target = target.tensor_split(self.partition.stacked)[shard_id == "w3"]
        if target.shape != part.shape:
            raise CheckpointError(
                f"{self._place(name)}: expected {list(target.shape)} on this rank, found {list(part.shape)}"
            )
        target.copy_(part)
        self._loaded.add(name)

    def _admit(self, name: str) -> None:
        """Check that a tensor, of an expert or of the layer, may be loaded now; the first one checks the files.

        Raises:
            CheckpointError: the files are damaged, or the tensor is there twice.
            UsageError: a kernel has its own copy of the experts.
        """
        if self._closed:
            raise UsageError(
                "reload_weights: packed experts cannot be replaced while they are served; expected a new server"
            )
        if not self._loaded and self._checkpoint is not None:
            self._checkpoint.check()
        if name in self._loaded:
            raise CheckpointError(f"{self._place(name)} is in the checkpoint twice")

    def _share(self, tensor: torch.Tensor, name: str, suffix: str, shard_id: str, local: int) -> tuple[slice, ...]:
        """Check a tensor's suffix, dtype and number of dimensions; return the index of this rank's part."""
        matrices = self.partition.w2 if shard_id == "w2" else self.partition.w13
        scheme, bits, size = matrices.schemes[local], matrices.bits[local], self.partition.config.group_size
        if suffix not in scheme.suffixes:
            raise CheckpointError(f"{self._place(name)} belongs to no expert of the config")
        expected = scheme.layout(matrices.rows, matrices.columns, bits, size, matrices.group_offset)[suffix]
        if tensor.dtype not in expected.dtypes or tensor.ndim != len(expected.shape):
            raise CheckpointError(f"{self._place(name)}: unexpected {tensor.dtype} {list(tensor.shape)}")
        own = self.partition.begin, self.partition.begin + self.partition.intermediate
        return scheme.cut(suffix, bits, size, **({"columns": own} if shard_id == "w2" else {"rows": own}))

    def _check_values(self, part: torch.Tensor, scheme: Scheme, name: str, suffix: str) -> None:
        try:
            scheme.check_values(part, suffix, "")
        except CheckpointError:
            scheme.check_values(part, suffix, self._place(name))  # finding the file takes a while

    def _place(self, name: str) -> str:
        return f"tensor {name}" if self._checkpoint is None else self._checkpoint.place(name)

    def check_complete(self) -> None:
        """Raise CheckpointError if a tensor of this rank's experts was not loaded; the message names the first."""
        for expert, scheme in zip(self.partition.local_experts, self.partition.local_schemes, strict=True):
            for projection in self._projection.values():
                for suffix in scheme.suffixes:
                    name = f"{self.partition.prefix}.{expert}.{projection}.{suffix}"
                    if name not in self._loaded:
                        raise CheckpointError(f"{self._place(name)} was not loaded: the checkpoint is incomplete")
        for rotated in map(self.partition.rotated, ("w13", "w2")):
            if rotated is not None and rotated.name not in self._loaded:
                raise CheckpointError(f"{self._place(rotated.name)} was not loaded: the checkpoint is incomplete")
        self._loaded.clear()

"""Put a checkpoint's expert tensors into this rank's ragged buffers, and notice what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_moeq.format import (
    CODES_PER_BLOCK,
    PACKED,
    SCALE,
    WHOLE_ROW,
    ZERO,
    CheckpointError,
    MoeqConfig,
    UsageError,
    check_values,
)
from vllm_moeq.kernels import RaggedMatrices, ragged
from vllm_moeq.serving.checkpoint import Checkpoint

WeightLoader = Callable[..., bool | None]


@dataclass(frozen=True)
class Partition:
    """This rank's share of one layer: some experts (EP), a slice of the intermediate dimension (TP).

    Attributes:
        prefix: the layer's name in the checkpoint.
        config: the checkpoint's configuration.
        widths: one width per global expert.
        local_experts: global indices of this rank's experts, in local order.
        hidden: hidden size.
        intermediate: intermediate size on this rank.
        rank: which slice of the intermediate dimension.
    """

    prefix: str
    config: MoeqConfig
    widths: tuple[int, ...]
    local_experts: tuple[int, ...]
    hidden: int
    intermediate: int
    rank: int

    @property
    def begin(self) -> int:
        """First intermediate neuron of this rank."""
        return self.rank * self.intermediate

    @property
    def local_widths(self) -> tuple[int, ...]:
        """Width per local expert."""
        return tuple(self.widths[expert] for expert in self.local_experts)

    @cached_property
    def w13(self) -> RaggedMatrices:
        """Gate and up: rows are split, so groups stay whole."""
        return ragged(self.local_widths, 2 * self.intermediate, self.hidden, self.config.group_size)

    @cached_property
    def w2(self) -> RaggedMatrices:
        """Down: the input dimension is split, maybe inside a group.

        Raises:
            UsageError: the split falls inside a block of 32 codes.
        """
        if self.intermediate % CODES_PER_BLOCK:
            raise UsageError(
                f"{self.prefix}: expected an intermediate size per rank that is a multiple of {CODES_PER_BLOCK}, "
                f"found {self.intermediate}; lower --tensor-parallel-size or add --enable-expert-parallel"
            )
        size = self.config.group_size
        offset = 0 if size == WHOLE_ROW else self.begin % size
        return ragged(self.local_widths, self.hidden, self.intermediate, size, offset)


class ExpertLoader:
    """Loads, checks and counts the tensors of one layer.

    Args:
        partition: what this rank has of it.
        checkpoint: where the tensors come from: checked before the first of them is loaded, and named by messages.
    """

    def __init__(self, partition: Partition, checkpoint: Checkpoint | None = None) -> None:
        self.partition = partition
        self._checkpoint = checkpoint
        self._local = {expert: local for local, expert in enumerate(partition.local_experts)}
        self._projection = dict(zip(("w1", "w3", "w2"), partition.config.projections.names(), strict=True))
        self._loaded: set[str] = set()

    def loader_for(self, suffix: str) -> WeightLoader:
        """Return vLLM's callback for one kind of tensor (packed words, scales or zeros)."""

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
        if not self._loaded and self._checkpoint is not None:
            self._checkpoint.check()
        if name in self._loaded:
            raise CheckpointError(f"{self._place(name)} is in the checkpoint twice")
        matrices = self.partition.w2 if shard_id == "w2" else self.partition.w13
        rows, columns = self._slice(tensor, name, suffix, shard_id, matrices.bits[local])
        part = tensor[rows, columns]
        if suffix == PACKED:
            begin, end = matrices.offsets[local], matrices.offsets[local + 1]
            target = param.data[begin:end].view(matrices.rows, -1)
        else:
            self._check_values(part, name, suffix)
            self._widen(param, part)
            target = param.data[local]
        half = self.partition.intermediate
        target = {"w1": target[:half], "w3": target[half:], "w2": target}[shard_id]
        if target.shape != part.shape:
            raise CheckpointError(
                f"{self._place(name)}: expected {list(target.shape)} on this rank, found {list(part.shape)}"
            )
        target.copy_(part)
        self._loaded.add(name)

    def _slice(self, tensor: torch.Tensor, name: str, suffix: str, shard_id: str, bits: int) -> tuple[slice, slice]:
        """Return this rank's rows and columns of a checkpoint tensor, after checking its dtype."""
        integer = tensor.dtype == torch.int32
        if tensor.ndim != 2 or integer != (suffix == PACKED) or not (integer or tensor.is_floating_point()):
            raise CheckpointError(f"{self._place(name)}: unexpected {tensor.dtype} {list(tensor.shape)}")
        begin, end = self.partition.begin, self.partition.begin + self.partition.intermediate
        if shard_id != "w2":
            return slice(begin, end), slice(None)
        if suffix == PACKED:
            return slice(None), slice(begin * bits // 32, end * bits // 32)
        size = self.partition.config.group_size
        if size == WHOLE_ROW:
            return slice(None), slice(None)
        return slice(None), slice(begin // size, -(-end // size))

    def _check_values(self, part: torch.Tensor, name: str, suffix: str) -> None:
        try:
            check_values(part, suffix, "")
        except CheckpointError:
            check_values(part, suffix, self._place(name))  # finding the file takes a while

    def _place(self, name: str) -> str:
        return f"tensor {name}" if self._checkpoint is None else self._checkpoint.place(name)

    @staticmethod
    def _widen(param: torch.nn.Parameter, part: torch.Tensor) -> None:
        """Keep scales in half precision unless a bfloat16 one does not fit it exactly."""
        if (
            param.dtype == torch.float16
            and part.dtype != torch.float16
            and not torch.equal(part.half().to(part.dtype), part)
        ):
            param.data = param.data.float()

    def check_complete(self) -> None:
        """Raise CheckpointError naming the first expert tensor of this rank that was not loaded."""
        for expert in self.partition.local_experts:
            for projection in self._projection.values():
                for suffix in (PACKED, SCALE, ZERO):
                    name = f"{self.partition.prefix}.{expert}.{projection}.{suffix}"
                    if name not in self._loaded:
                        raise CheckpointError(f"{self._place(name)} was not loaded: the checkpoint is incomplete")
        self._loaded.clear()

"""Convert a moeq checkpoint back into an ordinary one with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from planner.common.progress import Progress
from planner.model.architectures import Architecture
from planner.model.expert_views import fuse
from planner.model.hub import companions
from planner.model.recognize import find_architecture
from planner.model.whole import check_checkpoint
from planner.output.checkpoint import CheckpointWriter
from vllm_moeq.format import (
    ExpertMatrix,
    MoeqConfig,
    ShardSet,
    expert_matrices,
    linear_values,
    load_config,
    read_config_json,
)
from vllm_moeq.format.linears import LINEAR_SUFFIXES, SCALES, WORDS


def dequantize_linear(shards: ShardSet, base: str, bits: int) -> torch.Tensor:
    """Return one dequantized linear that is not an expert, float32 [N, K]."""
    return linear_values(shards.load(f"{base}.{WORDS}"), shards.load(f"{base}.{SCALES}"), bits)


def export_dense(folder: Path, output: Path, progress: Progress, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``output``, a Hugging Face folder in the source's layout that any server loads, shard by shard.

    Args:
        folder: the checkpoint.
        output: the folder to create.
        progress: shows the progress.
        dtype: dtype of all weights. bfloat16 rounds the dequantized values once, float32 not at all.

    Raises:
        MoeqError: a damaged checkpoint, an output that exists, a full disk.
    """
    check_checkpoint(folder)
    config = load_config(folder)
    source = read_config_json(folder / "config.json")
    name = str(dtype).removeprefix("torch.")
    with ShardSet(folder) as shards:
        matrices = {matrix.names()[0]: matrix for matrix in expert_matrices(shards, config)}
        dense = _Dense(shards, config, find_architecture(source), dtype, matrices)
        about = {"config": json.loads(config.model_dump_json()), "files": shards.stamps()}
        writer = CheckpointWriter(output, {"export": name, **about})
        try:
            for shard in progress.track(sorted({info.shard for info in shards.tensors.values()}), "exporting"):
                if not writer.has_shard(shard):
                    writer.write_shard(shard, dense.shard(shard))
            shards.check_unchanged()
            writer.copy(folder, companions(folder))
            source.pop("quantization_config")
            writer.finish({**source, "dtype": name}, {})
        except BaseException:
            writer.abandon()
            raise


@dataclass(frozen=True)
class _Dense:
    """A checkpoint that is converted to a dense one.

    Attributes:
        shards: the checkpoint's tensors.
        config: the checkpoint's configuration.
        row: the architecture, for the source's layout.
        dtype: dtype of the result.
        matrices: name of the codes → expert matrix.
    """

    shards: ShardSet
    config: MoeqConfig
    row: Architecture | None
    dtype: torch.dtype
    matrices: Mapping[str, ExpertMatrix]

    @cached_property
    def beside(self) -> frozenset[str]:
        """The names of tensors that belong to codes and stand beside them; a bias does not, and stays."""
        experts = (name for matrix in self.matrices.values() for name in matrix.names()[1:])
        linears = (f"{base}.{suffix}" for base in self._linears for suffix in LINEAR_SUFFIXES[1:])
        return frozenset((*experts, *linears))

    @cached_property
    def _linears(self) -> frozenset[str]:
        packed = (name for name in self.shards.tensors if name.endswith(f".{WORDS}") and name not in self.matrices)
        return frozenset(name.removesuffix(f".{WORDS}") for name in packed)

    def shard(self, shard: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one shard. Dequantized weights, named ``.weight``, replace packed tensors."""
        result: dict[str, torch.Tensor] = {}
        for name, info in self.shards.tensors.items():
            base, _, suffix = name.rpartition(".")
            if info.shard != shard or name in self.beside:
                continue
            matrix = self.matrices.get(name)
            if matrix is not None:
                result.update(self._expert(matrix))
            elif suffix == WORDS and base in self._linears:
                values = dequantize_linear(self.shards, base, self.config.linear.bits_of(base))
                result[f"{base}.weight"] = values.to(self.dtype)
            else:
                value = self.shards.load(name)
                result[name] = value.to(self.dtype) if info.dtype.is_floating_point else value
        return result

    def _expert(self, matrix: ExpertMatrix) -> dict[str, torch.Tensor]:
        """Return the dense tensor for an expert matrix.

        If the source stores a layer's experts in one tensor, the first matrix in it stands for the whole tensor, and
        the other matrices return nothing.
        """
        row, names = self.row, self.config.projections
        if row is None or row.fused is None:
            expert = str(matrix.expert) if row is None else row.expert.format(matrix.expert)
            values = matrix.dequantize(self.shards).to(self.dtype)
            return {f"{matrix.prefix}.{expert}.{matrix.projection}.weight": values}
        if matrix.expert or matrix.projection == names.up:
            return {}
        down = matrix.projection == names.down
        projections = [names.down] if down else [names.gate, names.up or names.gate]
        experts = range(len(self.config.experts[matrix.prefix]))
        by_place = self._by_place
        parts = [[self._values(by_place[matrix.prefix, e, projection]) for projection in projections] for e in experts]
        block = matrix.prefix.removesuffix(row.experts)
        return {block + (row.fused.down if down else row.fused.gate_up): fuse(row.fused, parts)}

    @cached_property
    def _by_place(self) -> dict[tuple[str, int, str], ExpertMatrix]:
        return {(it.prefix, it.expert, it.projection): it for it in self.matrices.values()}

    def _values(self, matrix: ExpertMatrix) -> torch.Tensor:
        return matrix.dequantize(self.shards).to(self.dtype)

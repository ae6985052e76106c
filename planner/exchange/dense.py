"""Convert a moeq checkpoint back into an ordinary one with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from planner.common.progress import Progress
from planner.model.architectures import Architecture, find_architecture
from planner.model.hub import companions
from planner.model.tensors import fuse
from planner.output.checkpoint import CheckpointWriter
from vllm_moeq.format import (
    PACKED,
    SCALE,
    ZERO,
    ExpertMatrix,
    MoeqConfig,
    ShardSet,
    dequantize,
    expert_matrices,
    linear_values,
    load_config,
    read_json,
    unpack,
)

BESIDE = (SCALE, ZERO, "weight_shape")
"""Suffixes of the tensors that belong to packed words. A bias is not among them: it is copied."""


def dequantize_expert(shards: ShardSet, matrix: ExpertMatrix) -> torch.Tensor:
    """Return one dequantized expert matrix, float32 [N, K]."""
    codes = unpack(shards.load(matrix.name(PACKED)), matrix.bits, matrix.columns)
    return dequantize(codes, shards.load(matrix.name(SCALE)), shards.load(matrix.name(ZERO)))


def dequantize_linear(shards: ShardSet, base: str, bits: int) -> torch.Tensor:
    """Return one dequantized linear that is not an expert, float32 [N, K]."""
    return linear_values(shards.load(f"{base}.{PACKED}"), shards.load(f"{base}.{SCALE}"), bits)


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
    config = load_config(folder)
    source = read_json(folder / "config.json")
    name = str(dtype).removeprefix("torch.")
    with ShardSet(folder) as shards:
        matrices = {matrix.name(PACKED): matrix for matrix in expert_matrices(shards, config)}
        dense = _Dense(shards, config, matrices, find_architecture(source), dtype)
        about = {"config": json.loads(config.model_dump_json()), "files": shards.stamps()}
        writer = CheckpointWriter(output, {"export": name, **about})
        try:
            for shard in progress.track(sorted({info.shard for info in shards.tensors.values()}), "exporting"):
                if not writer.has_shard(shard):
                    writer.write_shard(shard, dense.shard(shard))
            shards.check_unchanged()
            writer.copy(companions(folder))
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
        matrices: name of the packed words → expert matrix.
        row: the architecture, for the source's layout.
        dtype: dtype of the result.
    """

    shards: ShardSet
    config: MoeqConfig
    matrices: Mapping[str, ExpertMatrix]
    row: Architecture | None
    dtype: torch.dtype

    def shard(self, shard: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one shard. Dequantized weights, named ``.weight``, replace packed tensors."""
        result: dict[str, torch.Tensor] = {}
        packed = {name.removesuffix(f".{PACKED}") for name in self.shards.tensors if name.endswith(f".{PACKED}")}
        for name, info in self.shards.tensors.items():
            base, _, suffix = name.rpartition(".")
            if info.shard != shard or (base in packed and suffix in BESIDE):
                continue
            matrix = self.matrices.get(name)
            if matrix is not None:
                result.update(self._expert(matrix))
            elif suffix == PACKED:
                values = dequantize_linear(self.shards, base, self.config.linear.bits)
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
            values = dequantize_expert(self.shards, matrix).to(self.dtype)
            return {f"{matrix.prefix}.{expert}.{matrix.projection}.weight": values}
        if matrix.expert or matrix.projection == names.up:
            return {}
        down = matrix.projection == names.down
        projections = [names.down] if down else [names.gate, names.up or names.gate]
        experts = range(len(self.config.experts[matrix.prefix]))
        parts = [[self._values(f"{matrix.prefix}.{e}.{projection}") for projection in projections] for e in experts]
        block = matrix.prefix.removesuffix(row.experts)
        return {block + (row.fused.down if down else row.fused.gate_up): fuse(row.fused, parts)}

    def _values(self, base: str) -> torch.Tensor:
        return dequantize_expert(self.shards, self.matrices[f"{base}.{PACKED}"]).to(self.dtype)

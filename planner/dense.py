"""Turn a moeq checkpoint back into an ordinary bfloat16 one, with the quantized values."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from planner.checkpoint import CheckpointWriter
from planner.progress import Progress
from vllm_moeq.format import (
    PACKED,
    SCALE,
    ZERO,
    ExpertMatrix,
    MoeqConfig,
    ShardSet,
    dequantize,
    expert_matrices,
    load_config,
    read_json,
    unpack,
)


def dequantize_expert(shards: ShardSet, matrix: ExpertMatrix) -> torch.Tensor:
    """Return one expert's matrix, float32 [N, K]."""
    codes = unpack(shards.load(matrix.name(PACKED)), matrix.bits, matrix.columns)
    return dequantize(codes, shards.load(matrix.name(SCALE)), shards.load(matrix.name(ZERO)))


def dequantize_linear(shards: ShardSet, base: str, bits: int) -> torch.Tensor:
    """Return one packed linear that is not an expert, float32 [N, K]."""
    return linear_values(shards.load(f"{base}.{PACKED}"), shards.load(f"{base}.{SCALE}"), bits)


def linear_values(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return what a packed linear stands for, float32 [N, K], from words [N, K·b/32] and scales [N, K / G]."""
    codes = unpack(words, bits, words.shape[1] * 32 // bits)
    return dequantize(codes, scales, torch.full_like(scales, 2 ** (bits - 1)))


def export_dense(folder: Path, output: Path, progress: Progress) -> None:
    """Write ``output``, a bfloat16 Hugging Face folder that any server loads, shard by shard.

    Raises:
        MoeqError: a damaged checkpoint, an output that exists, a full disk.
    """
    config = load_config(folder)
    source = read_json(folder / "config.json")
    with ShardSet(folder) as shards:
        matrices = {matrix.name(PACKED): matrix for matrix in expert_matrices(shards, config)}
        fingerprint = {"export": "bf16", "config": json.loads(config.model_dump_json())}
        writer = CheckpointWriter(output, fingerprint)
        try:
            for shard in progress.track(sorted({info.shard for info in shards.tensors.values()}), "exporting"):
                if not writer.has_shard(shard):
                    writer.write_shard(shard, _dense_shard(shards, shard, config, matrices))
            writer.copy_companions(folder)
            source.pop("quantization_config")
            writer.finish({**source, "dtype": "bfloat16"}, {})
        except BaseException:
            writer.abandon()
            raise


def _dense_shard(
    shards: ShardSet, shard: str, config: MoeqConfig, matrices: dict[str, ExpertMatrix]
) -> dict[str, torch.Tensor]:
    """Return the tensors of one shard, packed ones replaced by ``.weight``."""
    result: dict[str, torch.Tensor] = {}
    packed = {name.removesuffix(f".{PACKED}") for name in shards.tensors if name.endswith(f".{PACKED}")}
    for name, info in shards.tensors.items():
        base, _, suffix = name.rpartition(".")
        if info.shard != shard or (base in packed and suffix != PACKED):
            continue
        if name in matrices:
            result[f"{base}.weight"] = dequantize_expert(shards, matrices[name]).bfloat16()
        elif base in packed:
            result[f"{base}.weight"] = dequantize_linear(shards, base, config.linear.bits).bfloat16()
        else:
            result[name] = shards.load(name).bfloat16() if info.dtype.is_floating_point else shards.load(name)
    return result

"""Packed linears that are no experts: compressed-tensors' ``pack-quantized`` form, symmetric."""

from __future__ import annotations

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.packing import dequantize, unpack
from vllm_moeq.format.schema import MoeqConfig
from vllm_moeq.format.schemes import check_finite
from vllm_moeq.format.shards import ShardSet

LINEAR_SUFFIXES = (WORDS, SCALES, SHAPE) = "weight_packed", "weight_scale", "weight_shape"
"""The last part of the names of a packed linear's tensors."""


def linear_values(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return what a packed linear that is no expert stands for: codes offset by 2^(b−1), symmetric.

    Args:
        words: int32 [N, K·b/32].
        scales: any float dtype [N, K / G].
        bits: 4 or 8.

    Returns:
        float32 [N, K].
    """
    codes = unpack(words, bits, words.shape[1] * 32 // bits)
    return dequantize(codes, scales, torch.full_like(scales, 2 ** (bits - 1)))


def check_linears(shards: ShardSet, config: MoeqConfig, known: set[str]) -> None:
    """Check the shapes of every packed linear that is no expert, and that its scales are finite.

    Args:
        shards: the checkpoint's tensors.
        config: its configuration.
        known: the names of experts' tensors.

    Raises:
        CheckpointError: the first tensor that is missing or does not fit ``linear``, or scales with NaN or infinity.
    """
    bits, group = config.linear.bits, config.linear.group_size
    for name, info in shards.tensors.items():
        if name in known or not name.endswith(f".{WORDS}"):
            continue
        base = name.removesuffix(f".{WORDS}")
        if bits == 16:
            raise CheckpointError(f"{shards.folder / info.shard}: tensor {name} is packed but linear.bits is 16")
        scale = shards.info(f"{base}.{SCALES}")
        rows, words = info.shape if len(info.shape) == 2 else (0, 0)
        columns = words * 32 // bits
        fits = columns % group == 0 and scale.dtype.is_floating_point and scale.shape == (rows, columns // group)
        if info.dtype != torch.int32 or columns == 0 or not fits:
            raise CheckpointError(
                f"{shards.folder / info.shard}: tensor {name}: {list(info.shape)} words do not fit "
                f"{bits} bits and scales {list(scale.shape)} in groups of {group}"
            )
        # Unlike an expert's, a scale may be 0: that of a group of weights that are all 0.
        check_finite(shards.load(f"{base}.{SCALES}"), shards.place(f"{base}.{SCALES}"))

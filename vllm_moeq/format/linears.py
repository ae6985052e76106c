"""Packed linears outside the experts: compressed-tensors' ``pack-quantized`` form, symmetric."""

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
    """Dequantize a packed linear outside the experts, whose zero point is 2^(b−1).

    Args:
        words: packed codes, int32 [N, K·b/32].
        scales: scales [N, K / G] of any float dtype.
        bits: the width b, 4 or 8.

    Returns:
        The weights, float32 [N, K].
    """
    codes = unpack(words, bits, words.shape[1] * 32 // bits)
    return dequantize(codes, scales, torch.full_like(scales, 2 ** (bits - 1)))


def check_linears(shards: ShardSet, config: MoeqConfig, known: set[str]) -> None:
    """Check the shapes of every packed linear outside the experts, and that its scales are finite.

    Args:
        shards: the checkpoint's tensors.
        config: the checkpoint's configuration.
        known: the names of the experts' tensors, which are skipped.

    Raises:
        CheckpointError: a tensor is missing or does not fit ``config.linear``, or scales hold NaN or infinity.
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
        size = shards.info(f"{base}.{SHAPE}")
        known_size = size.shape == (2,) and size.dtype in (torch.int32, torch.int64)
        found = shards.load(f"{base}.{SHAPE}").tolist() if known_size else f"{size.dtype} {list(size.shape)}"
        if found != [rows, columns]:
            raise CheckpointError(
                f"{shards.place(f'{base}.{SHAPE}')}: expected the integers {[rows, columns]}, found {found}"
            )
        # Unlike an expert's scale, this one is 0 where all weights of a group are 0.
        check_finite(shards.load(f"{base}.{SCALES}"), shards.place(f"{base}.{SCALES}"))

"""Packed linears outside the experts: compressed-tensors' ``pack-quantized`` form, symmetric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.headers import TensorInfo
from vllm_moeq.format.packing import dequantize, unpack
from vllm_moeq.format.schema import Linear, MoeqConfig
from vllm_moeq.format.schemes import check_finite
from vllm_moeq.format.shards import ShardSet

LINEAR_SUFFIXES = (WORDS, SCALES, SHAPE) = "weight_packed", "weight_scale", "weight_shape"
"""The last part of the names of a packed linear's tensors."""

JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Last part of a linear's name in vLLM → those of the linears of a checkpoint that it joins; they have one width."""


def joined(name: str, names: Collection[str]) -> tuple[str, ...]:
    """Return the linears that vLLM joins with this one, itself included.

    Args:
        name: the linear's name, without ``.weight``.
        names: names of all linears outside the experts, without ``.weight``; others are left out.
    """
    parent, dot, leaf = name.rpartition(".")
    parts = next((parts for parts in JOINED.values() if leaf in parts), (leaf,))
    return tuple(other for part in parts if (other := f"{parent}{dot}{part}") == name or other in names)


def split_width(widths: Mapping[str, int]) -> str | None:
    """Return what is wrong where linears that vLLM joins differ in width, or None if none do.

    Args:
        widths: name of a linear outside the experts, without ``.weight`` → its width; 16 if it is not packed.
    """
    for name, bits in widths.items():
        for other in joined(name, widths):
            if widths[other] != bits:
                return f"{name}: expected the {widths[other]} bits of {other}, as vLLM joins them, found {bits}"
    return None


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


def check_linears(shards: ShardSet, config: MoeqConfig, known: Collection[str]) -> Counter[int]:
    """Check the shapes of every packed linear outside the experts, and that its scales are finite.

    Args:
        shards: the checkpoint's tensors.
        config: the checkpoint's configuration.
        known: the names of the experts' tensors, which are skipped.

    Returns:
        Width → number of packed linears.

    Raises:
        CheckpointError: a tensor is missing or does not fit ``config.linear``, scales hold NaN or infinity, a linear is
            packed that ``unquantized`` names, or ``linear.widths`` names none that is packed or splits a width that
            vLLM joins.
    """
    packed = {
        name.removesuffix(f".{WORDS}"): info
        for name, info in shards.tensors.items()
        if name not in known and name.endswith(f".{WORDS}")
    }
    _check_names(shards, config, packed)
    for base, info in packed.items():
        _check_linear(shards, config.linear.alone(base), base, info)
    return Counter(config.linear.bits_of(base) for base in packed)


def _check_names(shards: ShardSet, config: MoeqConfig, packed: Collection[str]) -> None:
    """Check the names in ``unquantized`` and ``linear.widths`` against the linears that are packed.

    Raises:
        CheckpointError: naming the first that does not fit.
    """
    place = shards.folder / "config.json"
    for name in config.unquantized:
        if name in packed:
            raise CheckpointError(
                f"{shards.place(f'{name}.{WORDS}')}: expected none, as unquantized in config.json names the linear"
            )
    for name in config.linear.widths:
        if name not in packed:
            raise CheckpointError(f"{place}: linear.widths: {name}: tensor {name}.{WORDS} is missing")
    plain = (name.removesuffix(".weight") for name in shards.tensors if name.endswith(".weight"))
    widths = dict.fromkeys(plain, 16) | {name: config.linear.bits_of(name) for name in packed}
    reason = split_width(widths)
    if reason is not None:
        raise CheckpointError(f"{place}: linear: {reason}")


def _check_linear(shards: ShardSet, linear: Linear, base: str, info: TensorInfo) -> None:
    """Check the tensors of one packed linear.

    Args:
        shards: the checkpoint's tensors.
        linear: the linear's format.
        base: its name, without ``.weight``.
        info: the packed words.

    Raises:
        CheckpointError: see :func:`check_linears`.
    """
    bits, group, name = linear.bits, linear.group_size, f"{base}.{WORDS}"
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

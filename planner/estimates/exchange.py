"""Estimate the needs of converting a checkpoint to another format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from planner.common.memory import resident_bytes
from planner.estimates.needs import Needs
from planner.model.hub import companion_bytes
from planner.model.whole import check_checkpoint
from planner.output.files import SHARD_COPIES
from vllm_moeq.format import ShardSet, expert_matrices, load_config
from vllm_moeq.format.linears import WORDS

HEADER_BYTES = 128
"""Bytes of a tensor's entries in a shard's header and in the index."""


def export_needs(folder: Path, item_bytes: int | None) -> Needs:
    """Return the needs of ``moeq export``. Weights take ``item_bytes`` each; with None they stay packed.

    Raises:
        MoeqError: a damaged checkpoint.
    """
    check_checkpoint(folder, values=False)  # also because what it imports stays in memory
    config = load_config(folder)
    with ShardSet(folder) as shards:
        dense = {matrix.names()[0]: matrix for matrix in expert_matrices(shards, config)}
        beside = {name for matrix in dense.values() for name in matrix.names()[1:]}
        sizes: Counter[str] = Counter()
        for name, info in shards.tensors.items():
            packed = f"{name.rpartition('.')[0]}.{WORDS}" in shards.tensors
            if item_bytes is None or (not packed and name not in beside and not info.dtype.is_floating_point):
                sizes[info.shard] += info.nbytes
            elif name in dense:
                sizes[info.shard] += item_bytes * dense[name].weights
            elif name.endswith(WORDS):
                bits = config.linear.bits_of(name.removesuffix(f".{WORDS}"))
                sizes[info.shard] += item_bytes * info.shape[0] * (info.shape[-1] * 32 // bits)
            elif not packed and name not in beside:
                sizes[info.shard] += item_bytes * info.numel
        return _needs(folder, sizes, len(shards.tensors))


def import_needs(folder: Path) -> Needs:
    """Return the needs of ``moeq import``. It keeps codes and scales and changes their names.

    Raises:
        MoeqError: a damaged checkpoint.
    """
    with ShardSet(folder) as shards:
        sizes: Counter[str] = Counter()
        for info in shards.tensors.values():
            sizes[info.shard] += info.nbytes
        return _needs(folder, sizes, len(shards.tensors))


def _needs(folder: Path, sizes: Counter[str], tensors: int) -> Needs:
    copied = companion_bytes(folder)
    written = sum(sizes.values()) + copied + HEADER_BYTES * tensors
    return Needs(written, 0, resident_bytes() + SHARD_COPIES * max(sizes.values()), 0, 0.0)

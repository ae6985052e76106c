"""Check a whole moeq checkpoint: its format, and that it has every tensor of its architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.completeness.against_files import check_against_files, size
from vllm_moeq.completeness.classes import no_class
from vllm_moeq.completeness.compare import check_tied, compare
from vllm_moeq.completeness.config_values import check_values
from vllm_moeq.completeness.expected import Expected, expected_tensors
from vllm_moeq.format import (
    LINEAR_SUFFIXES,
    CheckpointError,
    MoeqConfig,
    ShardSet,
    Summary,
    TensorInfo,
    expert_matrices,
    load_config,
    open_shards,
    read_config_json,
    verify_shards,
)
from vllm_moeq.format.speculation import SPECULATIVE, announced, count_layers, first_gap, is_speculative

WORDS = LINEAR_SUFFIXES[0]

MODULES, MODULES_OF_TENSOR = 10_000, 8
"""Largest numbers of a model's modules and parameters, for a checkpoint with no tensors, and for each tensor."""

LAYER = re.compile(r"(.*\.\d+\.)")
"""The beginning of an experts' prefix, up to its layer's index."""


def verify_whole(folder: Path, *, values: bool = True) -> Summary:
    """Check a checkpoint's format as :func:`vllm_moeq.format.verify` does, then compare it with its class.

    Args:
        folder: the checkpoint.
        values: whether to check values too; loaders check the experts' while they load.

    Returns:
        Counts and sizes; ``only_experts`` is the reason if there is no class to compare with.

    Raises:
        MoeqError: a check fails; the message names the file and the tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder, found none")
    path = folder / "config.json"
    if path.is_file() and isinstance(found := read_config_json(path), dict):
        check_values(found, path)
    parsed = load_config(folder)
    config: dict[str, Any] = read_config_json(path)
    with open_shards(folder, parsed) as shards:
        summary = verify_shards(shards, parsed, values=values)
        check_against_files(shards, config, parsed, path)
        found = _decoded(shards, parsed)
        summary.only_experts = no_class(config)
        if summary.only_experts is None:
            expected = expected_tensors(config, path, MODULES + MODULES_OF_TENSOR * len(found))
            _compare(shards, expected, found, parsed, _kept_behind(shards, config, parsed))
            if values:
                check_tied(shards, expected)
    return summary


def _kept_behind(shards: ShardSet, config: dict[str, Any], parsed: MoeqConfig) -> set[str]:
    """Return the tensors of layers for speculative decoding that config.json announces; transformers has none.

    Raises:
        CheckpointError: there are fewer, or one lacks a tensor: vLLM would draft with random weights.
    """
    layers, more = size(config, "num_hidden_layers"), announced(config)
    found = {name for name in shards.tensors if is_speculative(name, layers, more)}
    own_stack = any(name.startswith(SPECULATIVE) for name in found)
    if count_layers(found) < more and not own_stack:
        raise CheckpointError(
            f"{shards.folder}: expected the tensors of {more} layers for speculative decoding, which config.json "
            f"announces, found {count_layers(found)}"
        )
    if (gap := first_gap(found, max(map(len, parsed.experts.values())))) is not None:
        raise CheckpointError(f"{shards.folder}: expected {gap} in a layer for speculative decoding, found none")
    return found


def _compare(
    shards: ShardSet,
    expected: Expected,
    found: dict[str, TensorInfo],
    parsed: MoeqConfig,
    behind: set[str],
) -> None:
    """Compare a checkpoint's tensors with its class's.

    Raises:
        CheckpointError: they differ.
    """
    elsewhere, besides = set[str](), set(behind)
    for prefix in parsed.experts:
        theirs, ours = _regrouped(prefix, len(parsed.experts[prefix]), expected, found)
        elsewhere |= theirs
        besides |= ours
    compare(shards, expected, found, elsewhere=elsewhere, besides=besides)


def _decoded(shards: ShardSet, parsed: MoeqConfig) -> dict[str, TensorInfo]:
    """Return the tensors that the packed ones stand for, and all others as they are.

    Raises:
        CheckpointError: a linear is there twice, packed and not; readers may take either.
    """
    found = dict(shards.tensors)
    for matrix in expert_matrices(shards, parsed):
        info = found[matrix.name(matrix.scheme.codes)]
        for name in matrix.names():
            found.pop(name, None)  # signs belong to several matrices
        found[matrix.name("weight")] = replace(info, shape=(matrix.rows, matrix.columns), dtype=torch.float32)
    for name, info in shards.tensors.items():
        if name in found and name.endswith(f".{WORDS}"):
            base = name.removesuffix(WORDS)
            if f"{base}weight" in found:
                raise CheckpointError(f"{shards.place(f'{base}weight')}: expected it packed or not, found both")
            for suffix in LINEAR_SUFFIXES:
                found.pop(f"{base}{suffix}", None)
            columns = info.shape[1] * 32 // parsed.linear.bits_of(base.removesuffix("."))
            found[f"{base}weight"] = replace(info, shape=(info.shape[0], columns), dtype=torch.float32)
    return found


def _regrouped(prefix: str, count: int, expected: Expected, found: dict[str, TensorInfo]) -> tuple[set[str], set[str]]:
    """Return the class's tensors of a layer's experts, and ours, where they hold the same weights in other tensors.

    A source may hold all experts of a layer in one tensor, or name them otherwise; our checkpoints never do.
    """
    layer = LAYER.match(prefix)
    inside = prefix if layer is None else layer[1]
    theirs = {name for name in expected.tensors if name.startswith(inside) and name not in found}
    shapes = {name: expected.tensors[name].shape for name in theirs}
    whole = {name for name, shape in shapes.items() if len(shape) == 3 and shape[0] == count}
    theirs = whole or {name for name in theirs if name.startswith(f"{prefix}.")}
    ours = {name for name in found if name.startswith(f"{prefix}.") and name not in expected.tensors}
    return (theirs, ours) if _weights(theirs, expected.tensors) == _weights(ours, found) else (set(), set())


def _weights(names: set[str], tensors: Mapping[str, TensorInfo]) -> int:
    """Return the number of weights of some tensors."""
    return sum(math.prod(tensors[name].shape) for name in names)

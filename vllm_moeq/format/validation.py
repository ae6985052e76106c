"""Check a moeq checkpoint: always its headers, on request also values such as scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.format.errors import CheckpointError, ConfigError
from vllm_moeq.format.files import check_inside, read_config_json
from vllm_moeq.format.linears import check_linears
from vllm_moeq.format.packing import CODES_PER_BLOCK
from vllm_moeq.format.rotation import Rotated
from vllm_moeq.format.schema import MoeqConfig, parse_config
from vllm_moeq.format.schemes import ExpertMatrix
from vllm_moeq.format.schemes.base import check_finite
from vllm_moeq.format.shards import ShardSet
from vllm_moeq.format.strangers import refuse_files, refuse_keys
from vllm_moeq.format.tensors import Tensors

EXPERT_COUNT = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The keys of config.json that may hold the number of experts; a model has one of them."""
NESTED = "text_config"
"""The key of config.json that holds the language model's part, in models for text and images."""


MOST_OTHERS, MOST_OF_LAYER, MOST_OF_EXPERT = 4_000, 100, 16
"""Largest numbers of tensors: of no layer (towers for images and sound have some 1,000), of a layer without its experts
(it has some thirty), and of an expert (it has twelve)."""


@dataclass
class Summary:
    """Counts and sizes (in bytes) of a verified checkpoint.

    ``widths`` and ``schemes`` count experts by their width and scheme, ``linears`` the packed linears outside the
    experts.

    ``only_experts`` is the reason why other tensors than the experts' were not compared with the architecture's class;
    None if they were, or if nobody asked for it.
    """

    folder: str
    layers: int = 0
    experts: int = 0
    expert_weights: int = 0
    expert_bytes: int = 0
    other_bytes: int = 0
    average_bits: float = 0.0
    widths: dict[int, int] = field(default_factory=dict)
    schemes: dict[str, int] = field(default_factory=dict)
    linears: dict[int, int] = field(default_factory=dict)
    only_experts: str | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.expert_bytes + self.other_bytes


def load_config(folder: Path) -> MoeqConfig:
    """Return the validated ``quantization_config`` of a folder's config.json.

    Raises:
        ConfigError: there is no ``quantization_config``, it violates the schema or does not have the model's number
            of experts, or config.json has a key of :data:`~vllm_moeq.format.strangers.KEYS`.
    """
    path = folder / "config.json"
    check_inside(path)
    config = read_config_json(path)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise ConfigError(f"{path}: expected a quantization_config, found none: not a moeq checkpoint")
    refuse_keys(config, path)
    parsed = parse_config(config["quantization_config"], str(path))
    for part in (config, config.get(NESTED)):
        if isinstance(part, dict):
            _check_model(part, parsed, path)
    return parsed


def _check_model(part: dict[str, Any], config: MoeqConfig, path: Path) -> None:
    """Refuse widths for more or fewer experts than the model has."""
    counts = [part[key] for key in EXPERT_COUNT if type(part.get(key)) is int]
    for prefix, widths in config.experts.items():
        if counts and len(widths) != counts[0]:
            raise ConfigError(f"{path}: experts.{prefix}: expected {counts[0]!r:.40} widths, found {len(widths)}")


def expert_matrices(shards: Tensors, config: MoeqConfig) -> Iterator[ExpertMatrix]:
    """Yield every matrix of every routed expert, checked for presence, dtype and shape.

    Raises:
        CheckpointError: a tensor is missing, or does not fit its width or its layer.
    """
    for prefix, widths in config.experts.items():
        shapes: dict[str, tuple[int, int]] = {}
        for expert, bits in enumerate(widths):
            scheme = config.scheme(prefix, expert)
            for projection in config.projections.names():
                matrix = scheme.read_matrix(shards, prefix, expert, projection, bits, config.group_size)
                shape = (matrix.rows, matrix.columns)
                first = shapes.setdefault(projection, shape)
                if shape != first:
                    raise CheckpointError(
                        f"{shards.folder}: {matrix.name(matrix.scheme.codes)}: expected {list(first)} weights "
                        f"as in expert 0, found {list(shape)}"
                    )
                rotated = config.rotated(prefix, projection)
                if expert == 0:
                    _check_signs(shards, rotated, matrix.columns)
                yield replace(matrix, rotated=rotated)
        gate, down = shapes[config.projections.gate], shapes[config.projections.down]
        up = gate if config.projections.up is None else shapes[config.projections.up]
        if gate != up or down != (gate[1], gate[0]):
            raise CheckpointError(
                f"{shards.folder}: {prefix}: gate {list(gate)}, up {list(up)} and down {list(down)} do not fit"
            )


def _check_signs(shards: Tensors, rotated: Rotated | None, columns: int) -> None:
    """Refuse signs that are missing, or do not fit a matrix with so many columns."""
    if rotated is None:
        return
    info, shape = shards.info(rotated.name), (columns // CODES_PER_BLOCK,)
    if info.dtype != torch.int32 or info.shape != shape:
        raise CheckpointError(
            f"{shards.place(rotated.name)}: expected torch.int32 {list(shape)}, found {info.dtype} {list(info.shape)}"
        )
    if columns % rotated.size:
        raise CheckpointError(
            f"{shards.place(rotated.name)}: expected a rotation whose size divides {columns}, found {rotated.size}"
        )


def verify(folder: Path, *, values: bool = True) -> Summary:
    """Check a whole checkpoint.

    Args:
        folder: the checkpoint.
        values: whether to check the experts' values with :meth:`Scheme.check_values`, and that all other weights are
            finite. The loaders check the experts' while they load. Codes need no check, since every bit pattern is a
            valid code. The few scales of other packed linears are always checked.

    Returns:
        Counts and sizes.

    Raises:
        MoeqError: a check fails; the message names the file and the tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder, found none")
    config = load_config(folder)
    with open_shards(folder, config) as shards:
        return verify_shards(shards, config, values=values)


def open_shards(folder: Path, config: MoeqConfig) -> ShardSet:
    """Open a checkpoint's shards, with no more tensors than its experts and the rest of a model may have.

    Raises:
        MoeqError: damaged headers or index.
    """
    experts = sum(map(len, config.experts.values()))
    most = MOST_OTHERS + MOST_OF_LAYER * len(config.experts) + MOST_OF_EXPERT * experts
    return ShardSet(folder, most=most, ours=True)


def verify_shards(shards: ShardSet, config: MoeqConfig, *, values: bool) -> Summary:
    """Check the open shards of a checkpoint with a config; see :func:`verify`."""
    folder = shards.folder
    refuse_files(folder, shards.files)
    summary = Summary(str(folder), layers=len(config.experts))
    known: set[str] = set()
    bit_sum = 0
    for matrix in expert_matrices(shards, config):
        known.update(matrix.names())
        summary.expert_bytes += matrix.nbytes
        summary.expert_weights += matrix.weights
        bit_sum += matrix.weights * matrix.bits
        for suffix in matrix.scheme.checked if values else ():
            name = matrix.name(suffix)
            matrix.scheme.check_values(shards.map(name), suffix, shards.place(name))
    summary.expert_bytes += sum(shards.info(name).nbytes for name in config.signs())
    _refuse_strays(shards, config, known)
    summary.linears = dict(check_linears(shards, config, known))
    for name, info in shards.tensors.items():
        if name not in known:
            summary.other_bytes += info.nbytes
            if values and info.dtype.is_floating_point:
                check_finite(shards.map(name), shards.place(name))
    summary.average_bits = bit_sum / summary.expert_weights
    for prefix, widths in config.experts.items():
        summary.experts += len(widths)
        for expert, bits in enumerate(widths):
            scheme = config.scheme(prefix, expert).name
            summary.widths[bits] = summary.widths.get(bits, 0) + 1
            summary.schemes[scheme] = summary.schemes.get(scheme, 0) + 1
    return summary


def _refuse_strays(shards: ShardSet, config: MoeqConfig, known: set[str]) -> None:
    """Refuse a tensor that is named like an expert's but belongs to no expert of the config."""
    for name in shards.tensors:
        if name not in known and _is_of_an_expert(name, config):
            raise CheckpointError(
                f"{shards.folder / shards.tensors[name].shard}: tensor {name} belongs to no expert of the config"
            )


def _is_of_an_expert(name: str, config: MoeqConfig) -> bool:
    """Tell whether a name begins with ``<prefix>.<number>.``; biases of all experts together do not."""
    head, _, _ = name.rpartition(".")
    while head:
        head, _, last = head.rpartition(".")
        if last.isdecimal() and head in config.experts:
            return True
    return False

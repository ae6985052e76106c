"""Check a moeq checkpoint: headers always, the values of scales and zero points on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.format.errors import CheckpointError, ConfigError
from vllm_moeq.format.files import check_inside, read_json
from vllm_moeq.format.packing import CODES_PER_BLOCK, packed_words
from vllm_moeq.format.schema import WHOLE_ROW, MoeqConfig, parse_config
from vllm_moeq.format.shards import INDEX_NAME, SINGLE_NAME, ShardSet, index_shards
from vllm_moeq.format.tensors import Tensors

PACKED, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero"
SCALE_DTYPES = (torch.float16, torch.bfloat16)

EXPERT_COUNT = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json; a model has one of them."""
NESTED = "text_config"
"""Where the config.json of a model for text and images has its language model's keys."""


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of one expert as the file holds it."""

    prefix: str
    expert: int
    projection: str
    bits: int
    rows: int
    columns: int
    groups: int

    def name(self, suffix: str) -> str:
        """Return the checkpoint name of the packed codes, the scales or the zeros."""
        return f"{self.prefix}.{self.expert}.{self.projection}.{suffix}"

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass
class Summary:
    """What a verified checkpoint holds; sizes in bytes."""

    folder: str
    layers: int = 0
    experts: int = 0
    expert_weights: int = 0
    expert_bytes: int = 0
    other_bytes: int = 0
    average_bits: float = 0.0
    widths: dict[int, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.expert_bytes + self.other_bytes


def load_config(folder: Path) -> MoeqConfig:
    """Return the validated ``quantization_config`` of a folder's config.json.

    Raises:
        ConfigError: no config.json, no ``quantization_config``, or one that breaks the schema.
    """
    path = folder / "config.json"
    check_inside(path)
    config = read_json(path)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise ConfigError(f"{path}: expected a quantization_config, found none: not a moeq checkpoint")
    parsed = parse_config(config["quantization_config"], str(path))
    for part in (config, config.get(NESTED)):
        if isinstance(part, dict):
            _check_model(part, parsed, path)
    return parsed


def _check_model(part: dict[str, Any], config: MoeqConfig, path: Path) -> None:
    """Refuse code to run, and widths for other experts than the model has."""
    if "auto_map" in part:
        raise ConfigError(f"{path}: auto_map: expected no code in a checkpoint, found {part['auto_map']!r:.80}")
    counts = [part[key] for key in EXPERT_COUNT if type(part.get(key)) is int]
    for prefix, widths in config.experts.items():
        if counts and len(widths) != counts[0]:
            raise ConfigError(f"{path}: experts.{prefix}: expected {counts[0]} widths, found {len(widths)}")


def _check_files(folder: Path) -> None:
    """Refuse weights of which readers might take others than these: they do not agree on an order of preference.

    Raises:
        CheckpointError: naming the file that nobody has checked.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if index.exists():
        if single.exists() and SINGLE_NAME not in index_shards(index).values():
            raise CheckpointError(f"{single}: expected no such file beside {INDEX_NAME}")
        return
    for path in sorted(folder.glob("*.safetensors")):
        if single.exists() and path.name != SINGLE_NAME:
            raise CheckpointError(f"{path}: expected no weights beside {SINGLE_NAME} without {INDEX_NAME}")


def _expert_matrix(shards: Tensors, config: MoeqConfig, prefix: str, expert: int, projection: str) -> ExpertMatrix:
    """Check the three tensors of one matrix against each other and against its width."""
    bits = config.experts[prefix][expert]
    base = f"{prefix}.{expert}.{projection}"
    packed = shards.info(f"{base}.{PACKED}")
    scale = shards.info(f"{base}.{SCALE}")
    zero = shards.info(f"{base}.{ZERO}")

    def expect(suffix: str, what: str, found: object) -> None:
        shard = shards.info(f"{base}.{suffix}").shard
        raise CheckpointError(f"{shards.folder / shard}: tensor {base}.{suffix}: expected {what}, found {found}")

    if packed.dtype != torch.int32 or len(packed.shape) != 2:
        expect(PACKED, "a 2-D int32 tensor", f"{packed.dtype} {list(packed.shape)}")
    if scale.dtype not in SCALE_DTYPES or len(scale.shape) != 2 or 0 in scale.shape:
        expect(SCALE, "a 2-D float16 or bfloat16 tensor", f"{scale.dtype} {list(scale.shape)}")
    if zero.dtype != scale.dtype or zero.shape != scale.shape:
        expect(ZERO, f"{scale.dtype} {list(scale.shape)}", f"{zero.dtype} {list(zero.shape)}")
    rows, groups = scale.shape
    words = packed.shape[1]
    columns = words * 32 // bits
    if config.group_size == WHOLE_ROW:
        if groups != 1:
            expect(SCALE, f"[{rows}, 1] (one group per row)", list(scale.shape))
    else:
        columns = groups * config.group_size
    if columns % CODES_PER_BLOCK or packed.shape != (rows, packed_words(columns, bits)):
        expect(PACKED, f"[{rows}, {columns * bits // 32}] for {bits} bits", list(packed.shape))
    return ExpertMatrix(prefix, expert, projection, bits, rows, columns, groups)


def expert_matrices(shards: Tensors, config: MoeqConfig) -> Iterator[ExpertMatrix]:
    """Yield every matrix of every routed expert, checked for presence, dtype and shape.

    Raises:
        CheckpointError: the first tensor that is missing or does not fit its width and its layer.
    """
    for prefix, widths in config.experts.items():
        shapes: dict[str, tuple[int, int]] = {}
        for expert in range(len(widths)):
            for projection in config.projections.names():
                matrix = _expert_matrix(shards, config, prefix, expert, projection)
                shape = (matrix.rows, matrix.columns)
                first = shapes.setdefault(projection, shape)
                if shape != first:
                    raise CheckpointError(
                        f"{shards.folder}: {matrix.name(PACKED)}: expected {list(first)} weights "
                        f"as in expert 0, found {list(shape)}"
                    )
                yield matrix
        gate, down = shapes[config.projections.gate], shapes[config.projections.down]
        up = gate if config.projections.up is None else shapes[config.projections.up]
        if gate != up or down != (gate[1], gate[0]):
            raise CheckpointError(
                f"{shards.folder}: {prefix}: gate {list(gate)}, up {list(up)} and down {list(down)} do not fit"
            )


def check_values(values: torch.Tensor, suffix: str, place: str) -> None:
    """Check scales or zeros; the one check that all readers call.

    Args:
        values: any float dtype and shape.
        suffix: :data:`SCALE` or :data:`ZERO`.
        place: file and tensor, as the message names them.

    Raises:
        CheckpointError: a value that is NaN or infinite, or a scale of 0.
    """
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{place}: expected finite values, found NaN or infinity")
    if suffix == SCALE and bool((values == 0).any()):
        raise CheckpointError(f"{place}: expected no scale of 0")


def verify(folder: Path, *, values: bool = True) -> Summary:
    """Check a whole checkpoint.

    Args:
        folder: the checkpoint.
        values: also read the scales and zeros of experts and check them as :func:`check_values` does;
            the loaders do that on the way. Packed codes need no such check, since every bit pattern is
            a valid code, and the few scales of other packed linears are always read.

    Returns:
        Counts and sizes.

    Raises:
        MoeqError: the first problem, naming file and tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder, found none")
    config = load_config(folder)
    _check_files(folder)
    with ShardSet(folder) as shards:
        summary = Summary(str(folder), layers=len(config.experts))
        known: set[str] = set()
        bit_sum = 0
        for matrix in expert_matrices(shards, config):
            for suffix in (PACKED, SCALE, ZERO):
                known.add(matrix.name(suffix))
                summary.expert_bytes += shards.info(matrix.name(suffix)).nbytes
            summary.expert_weights += matrix.weights
            bit_sum += matrix.weights * matrix.bits
            for suffix in (SCALE, ZERO) if values else ():
                name = matrix.name(suffix)
                check_values(shards.load(name), suffix, shards.place(name))
        _refuse_strays(shards, config, known)
        _check_linears(shards, config, known)
        for name, info in shards.tensors.items():
            if name not in known:
                summary.other_bytes += info.nbytes
    summary.average_bits = bit_sum / summary.expert_weights
    for widths in config.experts.values():
        summary.experts += len(widths)
        for bits in widths:
            summary.widths[bits] = summary.widths.get(bits, 0) + 1
    return summary


def _refuse_strays(shards: ShardSet, config: MoeqConfig, known: set[str]) -> None:
    """Refuse tensors below an experts prefix that no expert of the config owns."""
    for name in shards.tensors:
        if name not in known and _is_of_an_expert(name, config):
            raise CheckpointError(
                f"{shards.folder / shards.tensors[name].shard}: tensor {name} belongs to no expert of the config"
            )


def _is_of_an_expert(name: str, config: MoeqConfig) -> bool:
    """Tell ``<prefix>.<number>.…``; what a layer keeps for all its experts together, such as biases, is not ours."""
    head, _, _ = name.rpartition(".")
    while head:
        head, _, last = head.rpartition(".")
        if last.isdecimal() and head in config.experts:
            return True
    return False


def _check_linears(shards: ShardSet, config: MoeqConfig, known: set[str]) -> None:
    """Check the shapes of every packed linear that is not an expert, and that its scales are finite."""
    bits, group = config.linear.bits, config.linear.group_size
    for name, info in shards.tensors.items():
        if name in known or not name.endswith(f".{PACKED}"):
            continue
        base = name.removesuffix(f".{PACKED}")
        if bits == 16:
            raise CheckpointError(f"{shards.folder / info.shard}: tensor {name} is packed but linear.bits is 16")
        scale = shards.info(f"{base}.{SCALE}")
        rows, words = info.shape if len(info.shape) == 2 else (0, 0)
        columns = words * 32 // bits
        fits = columns % group == 0 and scale.dtype.is_floating_point and scale.shape == (rows, columns // group)
        if info.dtype != torch.int32 or columns == 0 or not fits:
            raise CheckpointError(
                f"{shards.folder / info.shard}: tensor {name}: {list(info.shape)} words do not fit "
                f"{bits} bits and scales {list(scale.shape)} in groups of {group}"
            )
        # A group of weights that are all 0 may have a scale of 0.
        check_values(shards.load(f"{base}.{SCALE}"), ZERO, shards.place(f"{base}.{SCALE}"))

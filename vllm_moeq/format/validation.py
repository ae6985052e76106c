"""Check a moeq checkpoint: headers always, the values of scales and zero points on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_moeq.format.errors import CheckpointError, ConfigError
from vllm_moeq.format.packing import CODES_PER_BLOCK, packed_words
from vllm_moeq.format.schema import WHOLE_ROW, MoeqConfig, parse_config
from vllm_moeq.format.shards import ShardSet, read_json

PACKED, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero"
SCALE_DTYPES = (torch.float16, torch.bfloat16)


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
    config = read_json(path)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise ConfigError(f"{path}: expected a quantization_config, found none: not a moeq checkpoint")
    return parse_config(config["quantization_config"], str(path))


def _expert_matrix(shards: ShardSet, config: MoeqConfig, prefix: str, expert: int, projection: str) -> ExpertMatrix:
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


def expert_matrices(shards: ShardSet, config: MoeqConfig) -> Iterator[ExpertMatrix]:
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


def _check_finite(shards: ShardSet, name: str) -> torch.Tensor:
    """Return a tensor's values."""
    values = shards.load(name)
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"{shards.folder / shards.info(name).shard}: tensor {name}: expected finite values, found NaN or infinity"
        )
    return values


def _check_values(shards: ShardSet, matrix: ExpertMatrix) -> None:
    for suffix in (SCALE, ZERO):
        name = matrix.name(suffix)
        values = _check_finite(shards, name)
        if suffix == SCALE and bool((values == 0).any()):
            raise CheckpointError(f"{shards.folder / shards.info(name).shard}: tensor {name}: expected no scale of 0")


def verify(folder: Path, *, values: bool = True) -> Summary:
    """Check a whole checkpoint.

    Args:
        folder: the checkpoint.
        values: also read scales and zeros and require them to be finite; packed codes need no such
            check, since every bit pattern is a valid code.

    Returns:
        Counts and sizes.

    Raises:
        MoeqError: the first problem, naming file and tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder, found none")
    config = load_config(folder)
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
            if values:
                _check_values(shards, matrix)
        _refuse_strays(shards, config, known)
        _check_linears(shards, config, known, values)
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


def _check_linears(shards: ShardSet, config: MoeqConfig, known: set[str], values: bool) -> None:
    """Check the shapes of every packed linear that is not an expert, and on request its scales."""
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
        if info.dtype != torch.int32 or columns == 0 or scale.shape != (rows, columns // group):
            raise CheckpointError(
                f"{shards.folder / info.shard}: tensor {name}: {list(info.shape)} words do not fit "
                f"{bits} bits and scales {list(scale.shape)} in groups of {group}"
            )
        if values:
            _check_finite(shards, f"{base}.{SCALE}")

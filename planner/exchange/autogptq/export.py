"""Convert a moeq checkpoint into one that GPTQModel loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from planner.common.progress import Progress
from planner.exchange.autogptq.config import gptq_config
from planner.exchange.autogptq.layout import WIDTHS, Version, encode
from planner.exchange.autogptq.names import module_name
from planner.model.hub import companions
from planner.model.layout import architecture_of
from planner.model.source import SourceModel
from planner.model.whole import check_checkpoint
from planner.output.checkpoint import CheckpointWriter
from planner.output.paths import check_output
from vllm_moeq.format import (
    CODES_PER_BLOCK,
    GRID,
    PACKED,
    SCALE,
    ZERO,
    CheckpointError,
    MoeqConfig,
    UsageError,
    expert_matrices,
    load_config,
)
from vllm_moeq.format.tensors import Tensors

IN_WORDS = ", ".join(map(str, WIDTHS))
HOW = f"make exportable checkpoints with moeq quantize --scheme grid --zero-points integer and --bits of {IN_WORDS}"


@dataclass(frozen=True)
class Packed:
    """A packed linear of a moeq checkpoint. Only expert matrices have stored zero points."""

    base: str
    bits: int
    expert: bool


def export_gptq(folder: Path, output: Path, version: Version, progress: Progress) -> None:
    """Write ``output`` in AutoGPTQ's format, shard by shard.

    Raises:
        MoeqError: before anything is written, a damaged checkpoint, experts of one bit or another width that the format
            lacks, zero points that are not integers, or scales that float16 cannot hold; later a full disk.
    """
    check_output(output)
    check_checkpoint(folder)
    config = load_config(folder)
    _refuse_widths(folder, config)
    with SourceModel(folder) as model:
        row, shards = architecture_of(model), model.shards
        linears = {linear.base: linear for linear in _packed(shards, config)}
        middle = [_check(shards, linear, version) for linear in linears.values()]  # all of them: a check may refuse
        symmetric = all(middle)
        settings = gptq_config(config, row, version, symmetric)
        if version == "v1" and not symmetric:
            progress.line("note: GPTQModel loads zero points of version 1 only if all are 2^(b-1); these are not")
        fingerprint = {"source": model.fingerprint(), "settings": {"export": "gptq", "zero_points": version}}
        writer = CheckpointWriter(output, fingerprint)
        try:
            for shard in progress.track(sorted({info.shard for info in shards.tensors.values()}), "exporting"):
                if not writer.has_shard(shard):
                    tensors = _shard(shards, shard, linears, version)
                    writer.write_shard(shard, {module_name(row, name): tensor for name, tensor in tensors.items()})
            shards.check_unchanged()
            writer.copy(folder, companions(folder))
            writer.finish({**model.config, "quantization_config": settings}, {"quantize_config.json": settings})
        except BaseException:
            writer.abandon()
            raise


def _refuse_widths(folder: Path, config: MoeqConfig) -> None:
    other = {
        f"{prefix}.{i}": bits
        for prefix, widths in config.experts.items()
        for i, bits in enumerate(widths)
        if bits not in WIDTHS
    }
    if other:
        first, bits = next(iter(other.items()))
        same = list(other.values()).count(bits)
        raise UsageError(
            f"{folder}: {same} experts have {bits} bit{'s' if bits > 1 else ''}, which GPTQ's format does not have "
            f"(first: {first}); {HOW}"
        )


def _packed(shards: Tensors, config: MoeqConfig) -> Iterator[Packed]:
    experts: dict[str, int] = {}
    for matrix in expert_matrices(shards, config):
        if matrix.scheme is not GRID:
            name = matrix.names()[0]
            raise UsageError(
                f"{shards.place(name)}: expected the scheme {GRID.name}, found {matrix.scheme.name}; {HOW}"
            )
        if matrix.rotated is not None:
            raise UsageError(f"{shards.place(matrix.rotated.name)}: expected experts that are not rotated; {HOW}")
        experts[matrix.name(PACKED)] = matrix.bits
    for name in shards.tensors:
        base, _, suffix = name.rpartition(".")
        if suffix == PACKED:
            yield Packed(base, experts.get(name, config.linear.bits_of(base)), name in experts)


def _refuse(shards: Tensors, name: str, expected: str, found: object) -> NoReturn:
    path = shards.folder / shards.info(name).shard
    raise CheckpointError(f"{path}: tensor {name}: expected {expected}, found {found}")


def _check(shards: Tensors, linear: Packed, version: Version) -> bool:
    """Refuse values that the format cannot hold; return whether all zero points are 2^(b−1)."""
    name = f"{linear.base}.{SCALE}"
    scales = shards.load(name).float()
    if scales.shape[0] % CODES_PER_BLOCK:
        _refuse(shards, name, f"a multiple of {CODES_PER_BLOCK} outputs, as GPTQ packs zero points", scales.shape[0])
    lost = scales.half().float() != scales
    if bool(lost.any()):
        _refuse(shards, name, "scales that float16, GPTQ's dtype, holds exactly", float(scales[lost][0]))
    if not linear.expert:
        return True
    name, highest = f"{linear.base}.{ZERO}", 2**linear.bits - 1
    zeros = shards.load(name).float()
    bad = (zeros != zeros.round()) | (zeros < 0) | (zeros > highest)
    if bool(bad.any()):
        _refuse(
            shards, name, f"integers 0 to {highest}, as GPTQ stores zero points", f"{float(zeros[bad][0]):g}; {HOW}"
        )
    if version == "v1" and bool((zeros == 0).any()):
        _refuse(shards, name, "no zero point of 0, which version 1 cannot hold", "one; use --zero-points v2")
    return bool((zeros == 2 ** (linear.bits - 1)).all())


def _shard(shards: Tensors, shard: str, linears: dict[str, Packed], version: Version) -> dict[str, torch.Tensor]:
    """Return the tensors of one shard. All four tensors of a linear go into the shard of its packed codes."""
    result: dict[str, torch.Tensor] = {}
    for name, info in shards.tensors.items():
        base, _, suffix = name.rpartition(".")
        if base not in linears:
            if info.shard == shard:
                result[name] = shards.load(name)
        elif suffix == PACKED and info.shard == shard:
            tensors = _encode(shards, linears[base], version)
            result.update({f"{base}.{suffix}": tensor for suffix, tensor in tensors.items()})
        elif suffix not in (PACKED, SCALE, ZERO, "weight_shape") and info.shard == shard:
            result[name] = shards.load(name)  # a bias
    return result


def _encode(shards: Tensors, linear: Packed, version: Version) -> dict[str, torch.Tensor]:
    scales = shards.load(f"{linear.base}.{SCALE}")
    half = torch.full_like(scales, 2 ** (linear.bits - 1))
    zeros = shards.load(f"{linear.base}.{ZERO}") if linear.expert else half
    return encode(shards.load(f"{linear.base}.{PACKED}"), scales, zeros, linear.bits, version)

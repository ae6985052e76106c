"""plan → quantize → write, one decoder layer in memory at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from planner.checkpoint import CheckpointWriter, SourceModel, check_output, check_space, write_json
from planner.estimate import Sizes, estimate
from planner.models import Layout, MoeLayer
from planner.plan import Plan
from planner.progress import Progress
from planner.quantizers import linear_group_size, quantize_linear, quantizer_for
from vllm_moeq.format import (
    CODES_PER_BLOCK,
    PACKED,
    SCALE,
    WHOLE_ROW,
    ZERO,
    CheckpointError,
    Linear,
    MoeqConfig,
    pack,
    read_json,
)

LAYER_NAME = re.compile(r"^model\.layers\.(\d+)\.")
HEADROOM_BYTES = 4 << 20
"""Headers, index, config and tokenizer, in the check for free space."""


@dataclass(frozen=True)
class QuantizeSettings:
    """Everything besides the plan that decides the output."""

    quantizer: str = "hqq"
    one_bit: str = "sign"
    group_size: int = 128
    linear: Linear = field(default_factory=lambda: Linear(bits=4))


def default_linear(model: SourceModel, layout: Layout, bits: int) -> Linear:
    """Return the linear format for a width, with a group size that tensor parallelism can split."""
    sizes = [model.shards.info(name).shape[1] for name in layout.linears]
    return Linear.model_validate({"bits": bits, "group_size": linear_group_size(sizes)})


def check_sizes(model: SourceModel, layout: Layout, settings: QuantizeSettings) -> None:
    """Refuse input dimensions that cannot be packed, before any work.

    Raises:
        CheckpointError: naming the first tensor.
    """
    for layer in layout.layers:
        for projection, (_, columns) in layer.shapes.items():
            group = columns if settings.group_size == WHOLE_ROW else settings.group_size
            _check_columns(model, layer.weight(0, projection), columns, group, "--group-size")
    if settings.linear.bits != 16:
        for name in layout.linears:
            columns = model.shards.info(name).shape[1]
            _check_columns(model, name, columns, settings.linear.group_size, "--linear-group-size")


def _check_columns(model: SourceModel, name: str, columns: int, group: int, flag: str) -> None:
    for divisor, why in ((CODES_PER_BLOCK, "the packing block"), (group, flag)):
        if columns % divisor:
            path = model.folder / model.shards.info(name).shard
            raise CheckpointError(
                f"{path}: tensor {name}: expected an input dimension that is a multiple of {divisor} ({why}), "
                f"found {columns}"
            )


def build_config(layout: Layout, plan: Plan, settings: QuantizeSettings) -> MoeqConfig:
    """Return the ``quantization_config`` of the output."""
    unquantized = [name.removesuffix(".weight") for name in layout.routers]
    unquantized += ["lm_head"] if "lm_head.weight" in layout.kept else []
    if settings.linear.bits == 16:
        unquantized += [name.removesuffix(".weight") for name in layout.linears]
    return MoeqConfig(
        quant_method="moeq",
        format_version=1,
        group_size=settings.group_size,
        projections=layout.layers[0].projections,
        experts=plan.experts,
        linear=settings.linear,
        unquantized=unquantized,
        plan=plan.summary(settings.quantizer),
    )


def quantize(
    model: SourceModel,
    layout: Layout,
    plan: Plan,
    output: Path,
    settings: QuantizeSettings,
    progress: Progress,
) -> Sizes:
    """Write the quantized checkpoint; the output folder appears only when it is complete.

    Returns:
        The estimate that the free space was checked against.

    Raises:
        MoeqError: before anything is written for whatever the headers tell; later for a damaged
            tensor or a full disk, with whole shards kept for the next run.
    """
    plan.check_against(layout, "plan")
    check_sizes(model, layout, settings)
    check_output(output)
    sizes = estimate(model, layout, plan.experts, settings.group_size, settings.linear)
    check_space(output, sizes.total_bytes + HEADROOM_BYTES)
    config = build_config(layout, plan, settings)
    fingerprint = {"source": model.fingerprint(), "config": config.model_dump(mode="json"), "one_bit": settings.one_bit}
    writer = CheckpointWriter(output, fingerprint)
    try:
        report = _write_shards(model, layout, plan, settings, writer, progress)
        writer.copy_companions(model.folder)
        quantization_config = config.model_dump(mode="json", exclude_none=True)
        extra = {"plan.json": plan.model_dump(mode="json"), "quantization_report.json": report}
        writer.finish({**model.config, "quantization_config": quantization_config}, extra)
    except BaseException:
        writer.abandon()
        raise
    return sizes


def _write_shards(
    model: SourceModel,
    layout: Layout,
    plan: Plan,
    settings: QuantizeSettings,
    writer: CheckpointWriter,
    progress: Progress,
) -> dict[str, Any]:
    """Write one shard per decoder layer and one for the rest; return the report of all layers."""
    moe = {layer.index: layer for layer in layout.layers}
    parts = _parts(layout)
    entries: list[Path] = []
    for number, index in enumerate(progress.track(parts, "quantizing"), start=1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        entry = writer.partial / f"{shard}.json"
        layer = moe.get(index) if index is not None else None
        if not writer.has_shard(shard):
            began = time.monotonic()
            tensors: dict[str, torch.Tensor] = {}
            errors = _quantize_experts(model, layer, plan, settings, tensors) if layer else []
            _add_others(model, layout, index, settings, tensors)
            facts = {"prefix": layer.prefix if layer else None, "experts": errors}
            write_json(entry, {**facts, "seconds": round(time.monotonic() - began, 3)})
            writer.write_shard(shard, tensors)
            if layer:
                _say(progress, layer, plan.experts[layer.prefix], errors, time.monotonic() - began)
        elif layer:
            progress.line(f"{layer.prefix}: done by an earlier run")
        entries.append(entry)
        # A mapped shard stays in resident memory; the next layer rarely needs the same one.
        model.shards.close()
    merged = [read_json(path) for path in entries]
    return {
        "quantizer": settings.quantizer,
        "one_bit": settings.one_bit,
        "layers": [entry for entry in merged if entry["prefix"]],
    }


@dataclass(frozen=True)
class ExpertReport:
    """How well one expert survived."""

    expert: int
    bits: int
    quantizer: str
    relative_error: float
    """‖W − Ŵ‖ / ‖W‖ over the three matrices."""


def _quantize_experts(
    model: SourceModel, layer: MoeLayer, plan: Plan, settings: QuantizeSettings, tensors: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    reports = []
    for expert, bits in enumerate(plan.experts[layer.prefix]):
        quantizer = quantizer_for(bits, settings.quantizer, settings.one_bit)
        squared_error = squared_norm = 0.0
        for projection in layer.projections.names():
            name = layer.weight(expert, projection)
            weight = model.shards.load(name)
            try:
                result = quantizer(weight, bits, settings.group_size)
            except CheckpointError as error:
                shard = model.shards.info(name).shard
                raise CheckpointError(f"{model.folder / shard}: tensor {name}: {error}") from None
            base = f"{layer.prefix}.{expert}.{projection}"
            tensors[f"{base}.{PACKED}"] = pack(result.codes, bits)
            tensors[f"{base}.{SCALE}"] = result.scales
            tensors[f"{base}.{ZERO}"] = result.zeros
            exact = weight.float()
            squared_error += float((result.dequantize() - exact).square().sum())
            squared_norm += float(exact.square().sum())
        relative = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
        name_of = settings.one_bit if bits == 1 else settings.quantizer
        reports.append(asdict(ExpertReport(expert, bits, name_of, round(relative, 6))))
    return reports


def _add_others(
    model: SourceModel,
    layout: Layout,
    index: int | None,
    settings: QuantizeSettings,
    tensors: dict[str, torch.Tensor],
) -> None:
    """Add the tensors of one decoder layer (or of none) that are not routed experts."""
    linears = set(layout.linears) if settings.linear.bits != 16 else set()
    for name in _names_of(layout, index):
        weight = model.shards.load(name)
        if name not in linears:
            tensors[name] = weight
            continue
        try:
            packed = quantize_linear(weight, settings.linear)
        except CheckpointError as error:
            raise CheckpointError(f"{model.folder / model.shards.info(name).shard}: tensor {name}: {error}") from None
        base = name.removesuffix(".weight")
        tensors.update({f"{base}.{suffix}": value for suffix, value in packed.items()})


def _layer_of(name: str) -> int | None:
    match = LAYER_NAME.match(name)
    return int(match.group(1)) if match else None


def _parts(layout: Layout) -> list[int | None]:
    """Return the decoder layers that have tensors, then None for the tensors outside any layer."""
    found = {_layer_of(name) for name in (*layout.linears, *layout.kept)}
    found.update(layer.index for layer in layout.layers)
    return [*sorted(index for index in found if index is not None), None]


def _names_of(layout: Layout, index: int | None) -> Iterator[str]:
    for name in (*layout.linears, *layout.kept):
        if _layer_of(name) == index:
            yield name


def _say(
    progress: Progress, layer: MoeLayer, widths: Sequence[int], errors: list[dict[str, Any]], seconds: float
) -> None:
    counts = ", ".join(f"{widths.count(bits)} × {bits} bit" for bits in sorted(set(widths), reverse=True))
    worst = max(errors, key=lambda entry: entry["relative_error"])
    progress.line(
        f"{layer.prefix}: {counts}; largest relative error {worst['relative_error']:.3f} "
        f"(expert {worst['expert']}, {worst['bits']} bit), {seconds:.1f} s"
    )

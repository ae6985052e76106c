"""The work for one decoder layer: read it, quantize it, write its shard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.common.memory import peak_bytes
from planner.model.layout import Layout, MoeLayer
from planner.model.source import SourceModel
from planner.output.files import write_json, write_tensors
from planner.plan_file import Plan
from planner.quantization.packed import ExpertReport, pack_expert
from planner.quantization.quantizers import quantizer_for
from planner.quantization.quantizers.rotated import bases, sign_tensors
from planner.quantization.rows import Threads, open_threads, quantize_linear_rows, quantize_rows
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format.schemes.base import check_finite

LINEAR_FALLBACK = "linear_fallback"
"""Key of the linears that were rounded without calibration, and why, in a layer's entry and in the report."""


@dataclass(frozen=True)
class LayerTask:
    """Everything that is needed to write one shard, small and picklable.

    Attributes:
        source: folder of the model.
        shard: file to write; ``entry`` is written beside it.
        layer: the routed experts; None for a shard without experts.
        widths: bits per expert.
        linears: names of tensors to quantize in vLLM's own format.
        kept: names of tensors to copy.
        settings: how to quantize.
    """

    source: Path
    shard: Path
    layer: MoeLayer | None
    widths: tuple[int, ...]
    linears: tuple[str, ...]
    kept: tuple[str, ...]
    settings: QuantizeSettings

    @property
    def entry(self) -> Path:
        """Path of the JSON file with the layer's part of the report."""
        return self.shard.with_name(f"{self.shard.name}.json")

    @property
    def label(self) -> str:
        """Name of the task in messages."""
        if self.layer:
            return self.layer.prefix
        return f"layer without experts ({self.shard.name})" if self.linears else f"the rest ({self.shard.name})"

    def run(self, threads: int, device: torch.device) -> Finished:
        """See :func:`run_task`."""
        return run_task(self, threads, device)


@dataclass(frozen=True)
class Finished:
    """A task whose shard and entry are written.

    Attributes:
        task: the task.
        experts: one report per expert.
        seconds: duration of the task.
        memory_bytes: peak resident memory of the process so far.
    """

    task: LayerTask
    experts: tuple[ExpertReport, ...]
    seconds: float
    memory_bytes: int


def plan_tasks(
    model: SourceModel, layout: Layout, plan: Plan, settings: QuantizeSettings, partial: Path
) -> list[LayerTask]:
    """Return one task per decoder layer, then one for the tensors outside any layer."""
    moe: dict[str | None, MoeLayer] = {layer.block: layer for layer in layout.layers}
    packed = {name: settings.linear.bits_of(name) != 16 for name in layout.linears}
    linears = _by_block(layout, [name for name in layout.linears if packed[name]])
    kept = _by_block(layout, [*(name for name in layout.linears if not packed[name]), *layout.kept])
    parts = [*(block for block in layout.blocks if block in {*moe, *linears, *kept}), None]
    tasks = []
    for number, block in enumerate(parts, start=1):
        layer = moe.get(block)
        tasks.append(
            LayerTask(
                source=model.folder.absolute(),
                shard=partial.absolute() / f"model-{number:05d}-of-{len(parts):05d}.safetensors",
                layer=layer,
                widths=tuple(plan.experts[layer.prefix]) if layer else (),
                linears=tuple(linears.get(block, ())),
                kept=tuple(kept.get(block, ())),
                settings=settings,
            )
        )
    return tasks


def _by_block(layout: Layout, names: Sequence[str]) -> dict[str | None, list[str]]:
    result: dict[str | None, list[str]] = {}
    for name in names:
        result.setdefault(layout.block_of(name), []).append(name)
    return result


def run_task(task: LayerTask, threads: int, device: torch.device) -> Finished:
    """Quantize the experts and linears of a task and write its shard.

    Raises:
        MoeqError: a damaged tensor, a full disk; then there is no shard.
    """
    began = time.monotonic()
    tensors: dict[str, torch.Tensor] = {}
    reports: list[ExpertReport] = []
    with SourceModel(task.source) as model, open_threads(threads, device) as pool:
        tensors.update(signs_of(task))
        for expert in range(len(task.widths)):
            more, report = quantize_expert(task, model, expert, pool)
            tensors.update(more)
            reports.append(report)
        tensors.update(other_tensors(task, model, pool))
        return write_layer(task, tensors, reports, began)


def signs_of(task: LayerTask) -> dict[str, torch.Tensor]:
    """Return the signs of a task's rotation under their names in a checkpoint; none without a rotation."""
    layer = task.layer
    return {} if layer is None else sign_tensors(layer, bases(layer, task.settings.rotation(layer)))


def quantize_expert(
    task: LayerTask, model: SourceModel, expert: int, threads: Threads
) -> tuple[dict[str, torch.Tensor], ExpertReport]:
    """Quantize one expert without calibration; return its tensors and its report.

    Raises:
        CheckpointError: a tensor that cannot be read or quantized; the message names it.
    """
    layer, bits, settings = task.layer, task.widths[expert], task.settings
    if layer is None:
        raise ValueError(f"{task.label} has no experts")
    scheme = settings.storage.schemes(layer.prefix, task.widths)[expert]
    quantizer = quantizer_for(bits, settings.quantizer, settings.one_bit, settings.zero_points, scheme)
    matrices, found = {}, bases(layer, settings.rotation(layer))
    for projection in layer.projections.names():
        name, basis = layer.weight(expert, projection), found.get(projection)
        matrices[projection] = quantize_rows(
            threads, model, name, quantizer, bits, settings.group_size, basis, scheme.row_step
        )
    return pack_expert(layer, expert, bits, matrices, settings.without_text(bits, scheme))


def other_tensors(
    task: LayerTask, model: SourceModel, threads: Threads, done: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a task that are not routed experts.

    Args:
        task: the task.
        model: the source.
        threads: threads that round linears.
        done: linears that are quantized already, name → suffix → tensor.

    Raises:
        CheckpointError: a tensor that cannot be read, or holds values that no model has; the message names it.
    """
    tensors = {name: model.shards.load(name) for name in task.kept}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            check_finite(tensor, model.shards.place(name))
    for name in task.linears:
        known = (done or {}).get(name)
        packed = known or quantize_linear_rows(threads, model, name, task.settings.linear.alone(name))
        base = name.removesuffix(".weight")
        tensors.update({f"{base}.{suffix}": value for suffix, value in packed.items()})
    return tensors


def write_layer(
    task: LayerTask,
    tensors: dict[str, torch.Tensor],
    reports: Sequence[ExpertReport],
    began: float,
    missed: Mapping[str, str] | None = None,
) -> Finished:
    """Write a task's entry, then its shard. So a shard always has its entry beside it.

    Args:
        task: the task.
        tensors: all tensors of the shard.
        reports: one per expert, in order.
        began: value of ``time.monotonic()`` when the task began.
        missed: name of a linear → reason why it was rounded without calibration.
    """
    prefix = task.layer.prefix if task.layer else None
    entry = {"prefix": prefix, "experts": [report.as_dict() for report in reports]}
    write_json(task.entry, {**entry, LINEAR_FALLBACK: dict(missed)} if missed else entry)
    write_tensors(task.shard, tensors)
    return Finished(task, tuple(reports), time.monotonic() - began, peak_bytes())


def merged_report(tasks: Sequence[LayerTask], entries: Sequence[Any], settings: QuantizeSettings) -> dict[str, Any]:
    """Return the contents of quantization_report.json: settings, layers with experts, linears that fell back."""
    missed = {name: reason for entry in entries for name, reason in entry.pop(LINEAR_FALLBACK, {}).items()}
    found = {
        "quantizer": settings.quantizer,
        "one_bit": settings.one_bit,
        "settings": settings.as_dict(),
        "layers": [entry for task, entry in zip(tasks, entries, strict=True) if task.layer],
    }
    return {**found, LINEAR_FALLBACK: missed} if missed else found

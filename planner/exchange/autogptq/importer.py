"""Convert a GPTQ checkpoint into a moeq checkpoint with the same codes, scales and zero points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from planner.common.progress import Progress
from planner.exchange.autogptq.assign import AssignedExperts, Linears, assign_experts, assign_linears
from planner.exchange.autogptq.layout import QWEIGHT, SCALES, decode
from planner.exchange.autogptq.read import GptqCheckpoint, Module, read_gptq
from planner.exchange.autogptq.whole import check_tensors, check_values
from planner.model.hub import companions
from planner.model.source import SourceModel
from planner.output.checkpoint import CheckpointWriter
from planner.output.paths import check_output
from planner.plan_file import IMPORTED
from vllm_moeq.format import PACKED, QUANT_METHOD, SCALE, MoeqConfig, parse_config, version_for


def import_gptq(folder: Path, output: Path, progress: Progress, describe: Callable[[Path], None] | None = None) -> None:
    """Write ``output``, a moeq checkpoint, shard by shard.

    Linears outside the experts are dequantized if our format cannot pack them; printed lines name them and the reason.
    ``describe``, such as ``write_card``, is called with the folder when all other files are in it.

    Raises:
        MoeqError: before anything is written, an unusable input; later a full disk.
    """
    check_output(output)
    with SourceModel(folder, decode=False) as model:
        checkpoint = read_gptq(model)
        experts = assign_experts(checkpoint)
        linears = assign_linears(checkpoint, experts)
        unchecked = check_tensors(checkpoint)
        check_values(checkpoint, linears.dequantized)
        if unchecked is not None:
            progress.line(f"note: only experts were checked for completeness: {unchecked}")
        _say(linears, progress)
        config = _config(checkpoint, experts, linears)
        writer = CheckpointWriter(output, {"source": model.fingerprint(), "settings": {"import": "gptq"}})
        try:
            for shard in progress.track(sorted({info.shard for info in model.shards.tensors.values()}), "importing"):
                if not writer.has_shard(shard):
                    tensors = _shard(checkpoint, shard, experts, linears)
                    if tensors:
                        writer.write_shard(shard, tensors)
            model.shards.check_unchanged()
            writer.copy(folder, companions(folder))
            quantization_config = config.model_dump(mode="json", exclude_none=True)
            writer.finish({**model.config, "quantization_config": quantization_config}, {}, describe)
        except BaseException:
            writer.abandon()
            raise


def _say(linears: Linears, progress: Progress) -> None:
    """Print the linears that are dequantized, one line per reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in linears.dequantized.items():
        names[reason].append(name)
    for reason, members in names.items():
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        progress.line(f"{members[0]}{more}: dequantized, since {reason}")


def _config(checkpoint: GptqCheckpoint, experts: AssignedExperts, linears: Linears) -> MoeqConfig:
    row, shards = checkpoint.row, checkpoint.model.shards
    plain = {
        name.removesuffix(".weight")
        for name, source in checkpoint.others.items()
        if name.endswith(".weight") and len(shards.info(source).shape) == 2 and not name.endswith("embed_tokens.weight")
    }
    plain |= {name for name in linears.dequantized if not name.endswith("embed_tokens")}
    layers = range(checkpoint.model.integer("num_hidden_layers"))
    routers = [row.router_name(index).removesuffix(".weight") for index in layers]
    first = [name for name in (*routers, "lm_head") if name in plain]
    plan = {
        "method": IMPORTED,
        "avg_bits": experts.average,
        "achieved_avg_bits": experts.average,
        "bit_choices": sorted({bits for widths in experts.widths.values() for bits in widths}),
        "quantizer": "gptq",
    }
    config = {
        "quant_method": QUANT_METHOD,
        "format_version": version_for(linears.spec),
        "group_size": experts.group_size,
        "projections": row.projections.model_dump(),
        "experts": experts.widths,
        "linear": linears.spec.model_dump(),
        "unquantized": [*first, *sorted(plain - set(first))],
        "plan": plan,
    }
    return parse_config(config, str(checkpoint.model.folder))


def _shard(
    checkpoint: GptqCheckpoint, shard: str, experts: AssignedExperts, linears: Linears
) -> dict[str, torch.Tensor]:
    """Return our tensors for one shard: the linears whose ``qweight`` is in it, and its unquantized tensors."""
    shards = checkpoint.model.shards
    result: dict[str, torch.Tensor] = {}
    for name, module in checkpoint.modules.items():
        if shards.info(module.name(QWEIGHT)).shard != shard:
            continue
        if name in experts.modules:
            tensors = decode(
                checkpoint.load(module, QWEIGHT), checkpoint.load(module, SCALES), checkpoint.zeros(module)
            )
        elif name in linears.packed:
            tensors = _packed_linear(checkpoint, module)
        else:
            tensors = {"weight": checkpoint.dequantize(module).to(checkpoint.dtype)}
        result.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
    for name, source in checkpoint.others.items():
        if shards.info(source).shard == shard:
            result[name] = shards.load(source)
    return result


def _packed_linear(checkpoint: GptqCheckpoint, module: Module) -> dict[str, torch.Tensor]:
    """Return a symmetric linear in compressed-tensors' format. Scales get the model's dtype if that is exact."""
    scales = checkpoint.load(module, SCALES).T.contiguous()
    rounded = scales.to(checkpoint.dtype)
    return {
        PACKED: checkpoint.load(module, QWEIGHT).T.contiguous(),
        SCALE: rounded if torch.equal(rounded.float(), scales.float()) else scales,
        "weight_shape": torch.tensor([module.rows, module.columns], dtype=torch.int64),
    }

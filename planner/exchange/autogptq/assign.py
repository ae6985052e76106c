"""Sort the quantized linears of a GPTQ checkpoint: experts, packed linears, and linears to dequantize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.exchange.autogptq.read import GptqCheckpoint, Module
from planner.model.architectures import EMBEDDINGS
from vllm_moeq.format import CODES_PER_BLOCK, EXPERT_COUNT, WHOLE_ROW, CheckpointError, Linear, joined


@dataclass(frozen=True)
class AssignedExperts:
    """The routed experts of a checkpoint.

    Attributes:
        widths: experts prefix → one width per expert.
        group_size: weights per scale, or −1 for whole rows.
        modules: our names of the expert matrices.
        average: average bits per expert weight.
    """

    widths: dict[str, list[int]]
    group_size: int
    modules: set[str]
    average: float


@dataclass(frozen=True)
class Linears:
    """The other quantized linears.

    Attributes:
        spec: format of the packed linears; 16 bits if there are none.
        packed: our names of the linears that stay packed.
        dequantized: our name of each linear to dequantize → reason.
    """

    spec: Linear
    packed: set[str]
    dequantized: dict[str, str]


def assign_experts(checkpoint: GptqCheckpoint) -> AssignedExperts:
    """Find every expert of every MoE layer.

    Raises:
        CheckpointError: an expert is missing, not quantized, or has several widths; experts have different group
            sizes; a tensor belongs to no expert.
    """
    model, row = checkpoint.model, checkpoint.row
    names = row.projections.names()
    widths: dict[str, list[int]] = {}
    found: dict[str, Module] = {}
    for index in range(model.integer("num_hidden_layers")):
        prefix = row.prefix(index)
        if not any(name.startswith(f"{prefix}.") for name in (*checkpoint.modules, *checkpoint.others)):
            continue
        widths[prefix] = []
        for expert in range(model.integer(*EXPERT_COUNT)):
            parts = {f"{prefix}.{expert}.{name}": _module(checkpoint, f"{prefix}.{expert}.{name}") for name in names}
            bits = {module.bits for module in parts.values()}
            if len(bits) > 1:
                each = ", ".join(f"{name} {module.bits}" for name, module in zip(names, parts.values(), strict=True))
                raise CheckpointError(f"{model.folder}: {prefix}.{expert}: expected one width, found {each} bits")
            widths[prefix].append(bits.pop())
            found.update(parts)
        _refuse_strays(checkpoint, prefix, set(found))
    if not found:
        raise CheckpointError(f"{model.folder}: expected quantized experts such as {row.prefix(0)}.0, found none")
    weights = sum(module.rows * module.columns for module in found.values())
    average = sum(module.rows * module.columns * module.bits for module in found.values()) / weights
    return AssignedExperts(widths, _group_size(checkpoint, found), set(found), average)


def _module(checkpoint: GptqCheckpoint, name: str) -> Module:
    module = checkpoint.modules.get(name)
    if module is None:
        what = "an unquantized one" if f"{name}.weight" in checkpoint.others else "none"
        raise CheckpointError(f"{checkpoint.model.folder}: {name}: expected a quantized matrix, found {what}")
    return module


def _refuse_strays(checkpoint: GptqCheckpoint, prefix: str, known: set[str]) -> None:
    for name in (*checkpoint.modules, *checkpoint.others):
        if name.startswith(f"{prefix}.") and name not in known:
            raise CheckpointError(f"{checkpoint.model.folder}: {name} belongs to no expert of the config")


def _group_size(checkpoint: GptqCheckpoint, modules: dict[str, Module]) -> int:
    """Return the group size that all experts share; −1 if it is the whole row of every matrix."""
    sizes = {module.group_size for module in modules.values()}
    if all(module.groups == 1 for module in modules.values()) and (checkpoint.whole_rows or len(sizes) > 1):
        return WHOLE_ROW
    size = next(iter(modules.values())).group_size
    for module in modules.values():
        if module.group_size != size or size % CODES_PER_BLOCK:
            raise CheckpointError(
                f"{checkpoint.model.folder}: {module.base}: expected experts with one group size, a multiple of "
                f"{CODES_PER_BLOCK}, found {module.group_size}"
                + (f" after {size}" if module.group_size != size else "")
            )
    return size


def assign_linears(checkpoint: GptqCheckpoint, experts: AssignedExperts) -> Linears:
    """Keep symmetric linears of 4 or 8 bits packed if they share one group size; mark the others for dequantization.

    If group sizes differ, the linears with the most frequent one stay packed.
    """
    rest = {name: module for name, module in checkpoint.modules.items() if name not in experts.modules}
    reasons = {name: _unfit(checkpoint, name, module) for name, module in rest.items()}
    sizes = Counter(rest[name].group_size for name, reason in reasons.items() if reason is None)
    size = sizes.most_common(1)[0][0] if sizes else CODES_PER_BLOCK
    for name, module in rest.items():
        if reasons[name] is None and module.group_size != size:
            reasons[name] = f"others have groups of {size}"
    known = {*rest, *(name.removesuffix(".weight") for name in checkpoint.others)}
    fit = [name for name, reason in reasons.items() if reason is None]
    reasons |= {name: _joined_otherwise(rest, reasons, joined(name, known), rest[name].bits) for name in fit}
    packed = {name for name, reason in reasons.items() if reason is None}
    dequantized = {name: reason for name, reason in reasons.items() if reason is not None}
    spec = Linear.model_validate({"bits": 16, "group_size": size, "widths": {name: rest[name].bits for name in packed}})
    return Linears(spec.stored(sorted(packed)) if packed else Linear(bits=16), packed, dequantized)


def _joined_otherwise(
    modules: Mapping[str, Module], reasons: Mapping[str, str | None], names: Iterable[str], bits: int
) -> str | None:
    """Return the reason why a linear of this width cannot be packed beside those that vLLM joins it with, or None."""
    for name in names:
        if name not in modules or reasons[name] is not None:
            return "vLLM joins it with a linear that is not packed"
        if modules[name].bits != bits:
            return "vLLM joins it with a linear of another width"
    return None


def _unfit(checkpoint: GptqCheckpoint, name: str, module: Module) -> str | None:
    """Return the reason why our format cannot pack a linear, or None."""
    if f"{name}.weight".endswith(EMBEDDINGS):
        return "embeddings and lm_head are not packed"
    if module.bits not in (4, 8):
        return f"linears of {module.bits} bits are not packed"
    if module.group_size % CODES_PER_BLOCK:
        return f"its group size is {module.group_size}"
    if not bool((checkpoint.zeros(module) == 2 ** (module.bits - 1)).all()):
        return "it is not symmetric"
    return None

"""Plans whose widths a test chooses, and checkpoints by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from planner.common.progress import Progress
from planner.model.layout import MoeLayer, read_layout
from planner.model.source import SourceModel
from planner.plan_file import Plan
from planner.quantization.run import quantize
from planner.quantization.settings import QuantizeSettings, default_linear
from vllm_moeq.format import joined


def plan_by_hand(experts: dict[str, list[int]]) -> Plan:
    """Return a plan with these widths, and with the average that they have."""
    widths = [bits for layer in experts.values() for bits in layer]
    average = sum(widths) / len(widths)
    return Plan.model_validate(
        {
            "version": 1,
            "method": "by hand",
            "bit_choices": sorted(set(widths)),
            "avg_bits": average,
            "achieved_avg_bits": average,
            "experts": experts,
        }
    )


def in_turn(linears: Sequence[str]) -> dict[str, int]:
    """Return 4, 8 and 16 bits in turn for linears, the same where vLLM joins them."""
    names = [name.removesuffix(".weight") for name in linears]
    groups = dict.fromkeys(joined(name, names) for name in names)
    return {name: (4, 8, 16)[number % 3] for number, group in enumerate(groups) for name in group}


def quantize_by_hand(
    source: Path,
    output: Path,
    widths: Callable[[MoeLayer], Sequence[int]],
    *,
    linear_bits: int = 4,
    mixed_linears: bool = False,
    group_size: int = 32,
    describe: Callable[[Path], None] | None = None,
    **settings: Any,
) -> Path:
    """Quantize a model; ``widths`` returns those of a layer's experts. Mixed linears have 4, 8 and 16 bits in turn."""
    with SourceModel(source) as model:
        layout = read_layout(model)
        plan = plan_by_hand({layer.prefix: list(widths(layer)) for layer in layout.layers})
        linear = default_linear(model, layout, linear_bits)
        if mixed_linears:
            linear = linear.model_copy(update={"widths": in_turn(layout.linears)})
        chosen = QuantizeSettings(group_size=group_size, linear=linear, **settings)
        quantize(model, layout, plan, output, chosen, Progress(quiet=True), describe=describe)
    return output

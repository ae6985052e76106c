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


def quantize_by_hand(
    source: Path,
    output: Path,
    widths: Callable[[MoeLayer], Sequence[int]],
    *,
    linear_bits: int = 4,
    group_size: int = 32,
    describe: Callable[[Path], None] | None = None,
    **settings: Any,
) -> Path:
    """Quantize a model; ``widths`` returns those of a layer's experts."""
    with SourceModel(source) as model:
        layout = read_layout(model)
        plan = plan_by_hand({layer.prefix: list(widths(layer)) for layer in layout.layers})
        chosen = QuantizeSettings(group_size=group_size, linear=default_linear(model, layout, linear_bits), **settings)
        quantize(model, layout, plan, output, chosen, Progress(quiet=True), describe=describe)
    return output

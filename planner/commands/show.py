"""Print results for people."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.common.shown import add_row, say
from planner.common.units import layer_number, size
from planner.model.sizes import Sizes
from planner.planning.methods import METHODS
from vllm_moeq.format import GRID, Summary

if TYPE_CHECKING:  # it imports calibration and comparison, a third of the time that moeq verify takes to start
    from planner.api.results import Planned

COLOURS = {1: "white on red3", 2: "black on orange1", 3: "black on green3", 4: "white on blue3", 8: "white on purple4"}
MAX_LAYERS_SHOWN = 64
MAX_EXPERTS_SHOWN = 64


def emit(value: Any) -> None:
    """Print JSON. A number that is infinite or none becomes null, since JSON has no word for it."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """Return a JSON value without infinite numbers."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_inspection(facts: Mapping[str, Any]) -> None:
    """Print the facts of a model and the router norms of its layers."""
    console = Console()
    share = facts["expert_parameters"] / facts["parameters"]
    say(f"{facts['model']}: {facts['model_type']}, {', '.join(facts['dtypes'])}")
    console.print(
        f"{facts['parameters']:,} parameters, {share:.1%} of them in routed experts; "
        f"{size(facts['bytes'])}, experts {size(facts['expert_bytes'])}"
    )
    table = Table("layer", "experts", "router norm: least", "median", "largest")
    for layer in facts["layers"]:
        norms = torch.tensor(layer["router_norm"])
        values = (norms.min(), norms.median(), norms.max())
        add_row(
            table, layer_number(layer["prefix"]), str(layer["experts"]), *(f"{float(value):.4f}" for value in values)
        )
    console.print(table)


def print_widths(experts: Mapping[str, Sequence[int]]) -> None:
    """Print one coloured cell per expert, one line per layer."""
    console = Console()
    console.print("bits per expert, one line per MoE layer:")
    for shown, (prefix, widths) in enumerate(experts.items()):
        if shown == MAX_LAYERS_SHOWN:
            console.print(f"… {len(experts) - shown} more layers")
            break
        line = Text(f"{layer_number(prefix):>5} ")
        for bits in widths[:MAX_EXPERTS_SHOWN]:
            line.append(f" {bits} ", style=COLOURS[bits])
        if len(widths) > MAX_EXPERTS_SHOWN:
            line.append(f" … {len(widths)} experts")
        line.append(f"  mean {sum(widths) / len(widths):.3f}")
        console.print(line, soft_wrap=True)


def print_linears(widths: Mapping[str, int]) -> None:
    """Print how many linears outside the experts have each width, if the plan gives them any."""
    if widths:
        counts = ", ".join(f"{count} × {bits} bit" for bits, count in sorted(Counter(widths.values()).items()))
        Console().print(f"linears outside the experts: {counts}", soft_wrap=True)


def print_sizes(sizes: Sizes) -> None:
    """Print source and output sizes."""
    ratio = sizes.source_bytes / sizes.total_bytes
    Console().print(
        f"size {size(sizes.source_bytes)} → {size(sizes.total_bytes)} ({ratio:.2f} times smaller): "
        f"experts {size(sizes.expert_bytes)}, linears {size(sizes.linear_bytes)}, 16-bit {size(sizes.kept_bytes)}",
        soft_wrap=True,
    )


def print_plan(made: Planned) -> None:
    """Print a plan: widths, promotions, sizes."""
    plan = made.plan
    print_widths(plan.experts)
    print_linears(plan.linears)
    moved = sum(len(ids) for ids in plan.promoted.values())
    total = sum(len(widths) for widths in plan.experts.values())
    console = Console()
    promoted = f"; MaxVar promoted {moved} of {total} experts" if METHODS[plan.method].promotes else ""
    console.print(
        f"method {plan.method}: average {plan.achieved_avg_bits:.4f} bits of {plan.avg_bits:g} requested{promoted}",
        soft_wrap=True,
    )
    if plan.near_ties:
        pairs = sum(len(ids) for ids in plan.near_ties.values())
        console.print(f"{pairs} pairs of neighbours are near-ties: their order is arbitrary")
    print_sizes(made.sizes)


def _linears(summary: Summary) -> str:
    """Return what the packed linears outside the experts are, where they have several widths."""
    counts = ", ".join(f"{count} × {bits} bit" for bits, count in sorted(summary.linears.items()))
    return f"; linears {counts}" if len(summary.linears) > 1 else ""


def print_summary(summary: Summary) -> None:
    """Print the contents of a verified checkpoint."""
    widths = ", ".join(f"{count} × {bits} bit" for bits, count in sorted(summary.widths.items()))
    schemes = ", ".join(f"{count} × {name}" for name, count in summary.schemes.items())
    stored = "" if set(summary.schemes) <= {GRID.name} else f"; {schemes}"
    say(
        f"{summary.folder}: valid; {summary.layers} MoE layers, {summary.experts} experts ({widths}{stored}), "
        f"average {summary.average_bits:.4f} bits; experts {size(summary.expert_bytes)}, "
        f"other tensors {size(summary.other_bytes)}{_linears(summary)}"
    )
    if summary.only_experts is not None:
        say(f"only experts were checked for completeness: {summary.only_experts}")

"""Print what a command would take: its dry run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.commands import show
from planner.common.progress import duration
from planner.common.units import GIB, size
from planner.estimates import Needs, Service, ServingNeeds, serving_needs
from planner.estimates.paper_formula import config_sizes
from planner.estimates.serving import FIXED_BYTES, RANKS
from planner.model.layout import Layout
from planner.model.sizes import Sizes, estimate
from planner.model.skeleton import ConfigModel
from planner.model.source import SourceModel
from planner.plan_file import Plan
from planner.quantization.settings import QuantizeSettings, check_sizes


def report_quantize_needs(average: float, sizes: Sizes, needs: Needs, serving: ServingNeeds, as_json: bool) -> None:
    """Print the result of a dry run of quantizing."""
    if as_json:
        facts = {"achieved_avg_bits": average, "sizes": sizes.as_dict()}
        show.emit({**facts, "needs": needs.as_dict(), "serving": serving.as_dict()})
        return
    show.print_sizes(sizes.as_dict())
    print_needs("quantizing", needs, serving)


def report_needs(what: str, needs: Needs, as_json: bool) -> None:
    """Print the result of a dry run of another command."""
    if as_json:
        show.emit({"needs": needs.as_dict()})
    else:
        print_needs(what, needs)


def print_needs(what: str, needs: Needs, serving: ServingNeeds | None = None) -> None:
    """Print the needs of a command, named such as ``quantizing``, and those of serving its output."""
    console = Console(highlight=False)
    temporary = f" and {size(needs.temporary_bytes)} for a while" if needs.temporary_bytes else ""
    device = f", {size(needs.device_bytes)} on each GPU (estimated, never measured)" if needs.device_bytes else ""
    seconds = f", about {duration(needs.seconds)} on this machine" if needs.seconds else ""
    disk, memory = size(needs.written_bytes), size(needs.ram_bytes)
    console.print(f"{what} takes {disk} on disk{temporary}, {memory} of memory{device}{seconds}", soft_wrap=True)
    if serving is not None:
        console.print(serving_line(serving), soft_wrap=True)


def serving_line(serving: ServingNeeds) -> str:
    """Return one line about the GPUs that serve the output."""
    load = f"{serving.concurrency} requests of {serving.context} tokens"
    if serving.gpus is None:
        count = f"more than {RANKS[-1]} GPUs, or fewer requests:"
    else:
        flag = f" (--tensor-parallel-size {serving.gpus})" if serving.gpus > 1 else ""
        count = f"{serving.gpus} GPU{'s' if serving.gpus > 1 else ''} of {serving.gpu_gib:g} GiB{flag}:"
    return (
        f"serving {load} takes {count} {size(serving.weight_bytes)} of weights, {size(serving.cache_bytes)} of cache, "
        f"{size(FIXED_BYTES)} reserved, on each"
    )


def report_plan_needs(
    model: SourceModel,
    layout: Layout,
    made: Plan,
    settings: QuantizeSettings,
    needs: Needs,
    service: Service,
    as_json: bool,
) -> None:
    """Print sizes: from a checkpoint's headers, or from its config.json alone, then beside the paper's formula.

    Raises:
        CheckpointError: input dimensions that cannot be packed.
    """
    check_sizes(model, layout, settings)
    facts = dry_run_facts(model, layout, made, settings)
    sizes = estimate(model, layout, made.experts, settings.group_size, settings.linear, settings.scheme)
    serving = serving_needs(model.config, layout, sizes, service)
    if as_json:
        show.emit({**facts, "needs": needs.as_dict(), "serving": serving.as_dict()})
        return
    if isinstance(model, ConfigModel):
        _print_table(facts)
    show.print_sizes(facts["sizes"])
    print_needs("planning", needs, serving)


def dry_run_facts(model: SourceModel, layout: Layout, made: Plan, settings: QuantizeSettings) -> dict[str, Any]:
    """Return the average and the bytes as JSON values; without weights also counts, and the GiB of the table."""
    found = config_sizes(model, layout, made.experts, settings.group_size, settings.linear, settings.scheme)
    facts: dict[str, Any] = {"achieved_avg_bits": made.achieved_avg_bits, "sizes": found.ours.as_dict()}
    if not isinstance(model, ConfigModel):
        return facts
    widths = Counter(bits for row in made.experts.values() for bits in row)
    totals = {"bf16": found.bf16_bytes, "ours": found.ours.total_bytes, "paper": found.paper_bytes}
    return {
        "model": str(model.folder),
        "model_type": layout.model_type,
        "weights": {**asdict(found.counts), "total": found.counts.total},
        "experts_per_width": {str(bits): widths[bits] for bits in made.bit_choices},
        "gib": {name: count / GIB for name, count in totals.items()},
        **facts,
    }


def _print_table(facts: Mapping[str, Any]) -> None:
    weights, console = facts["weights"], Console()
    share = weights["experts"] / weights["total"]
    console.print(
        f"{facts['model']}: {facts['model_type']}, config.json alone; {weights['total']:,} weights, {share:.1%} of "
        "them in routed experts",
        soft_wrap=True,
    )
    widths = facts["experts_per_width"]
    table = Table(*(f"{bits} bit" for bits in widths), "average", "bf16, GiB", "moeq, GiB", "paper, GiB")
    sizes = (f"{facts['gib'][name]:.2f}" for name in ("bf16", "ours", "paper"))
    table.add_row(*map(str, widths.values()), f"{facts['achieved_avg_bits']:.4f}", *sizes)
    console.print(table)

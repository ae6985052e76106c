"""Print what a command would take: its dry run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from planner.api.results import Estimate
from planner.commands import show
from planner.common.progress import duration
from planner.common.units import size
from planner.estimates import Needs, ServingNeeds
from planner.estimates.serving import FIXED_BYTES, RANKS


def report_needs(what: str, found: Estimate, as_json: bool) -> None:
    """Print the result of a dry run of a command, named such as ``quantizing``."""
    if as_json:
        show.emit(found.as_dict())
        return
    if found.formula:
        _print_table(found)
    if found.sizes is not None:
        show.print_sizes(found.sizes)
    print_needs(what, found.needs, found.serving)


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
        flag = f" ({serving.flags})" if serving.flags else ""
        count = f"{serving.gpus} GPU{'s' if serving.gpus > 1 else ''} of {serving.gpu_gib:g} GiB{flag}:"
    return (
        f"serving {load} takes {count} {size(serving.weight_bytes)} of weights, {size(serving.cache_bytes)} of cache, "
        f"{size(FIXED_BYTES)} reserved, on each"
    )


def _print_table(found: Estimate) -> None:
    """Print the weights and the GiB of a model without weights."""
    facts, console = found.formula, Console()
    weights = facts["weights"]
    share = weights["experts"] / weights["total"]
    console.print(
        f"{facts['model']}: {facts['model_type']}, config.json alone; {weights['total']:,} weights, {share:.1%} of "
        "them in routed experts",
        soft_wrap=True,
    )
    widths = facts["experts_per_width"]
    table = Table(*(f"{bits} bit" for bits in widths), "average", "bf16, GiB", "moeq, GiB", "paper, GiB")
    sizes = (f"{facts['gib'][name]:.2f}" for name in ("bf16", "ours", "paper"))
    table.add_row(*map(str, widths.values()), f"{found.achieved_avg_bits:.4f}", *sizes)
    console.print(table)

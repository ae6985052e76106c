"""What a dry run prints."""

from __future__ import annotations

from rich.console import Console

from planner.commands import show
from planner.common.progress import duration
from planner.common.units import size
from planner.estimates.needs import Needs
from planner.estimates.serving import FIXED_BYTES, RANKS, ServingNeeds
from planner.model.sizes import Sizes


def report_needs(average: float, sizes: Sizes, needs: Needs, serving: ServingNeeds, as_json: bool) -> None:
    """Print the result of a dry run of quantizing."""
    if as_json:
        facts = {"achieved_avg_bits": average, "sizes": sizes.as_dict()}
        show.emit({**facts, "needs": needs.as_dict(), "serving": serving.as_dict()})
        return
    show.print_sizes(sizes.as_dict())
    print_needs("quantizing", needs, serving)


def report(what: str, needs: Needs, as_json: bool) -> None:
    """Print the result of a dry run of another command."""
    if as_json:
        show.emit({"needs": needs.as_dict()})
    else:
        print_needs(what, needs)


def print_needs(what: str, needs: Needs, serving: ServingNeeds | None = None) -> None:
    """Print what a command, such as ``quantizing``, takes, and what serving its output takes."""
    console = Console(highlight=False)
    temporary = f" and {size(needs.temporary_bytes)} for a while" if needs.temporary_bytes else ""
    device = f", {size(needs.device_bytes)} on each GPU (estimated, never measured)" if needs.device_bytes else ""
    seconds = f", about {duration(needs.seconds)} on this machine" if needs.seconds else ""
    disk, memory = size(needs.written_bytes), size(needs.ram_bytes)
    console.print(f"{what} takes {disk} on disk{temporary}, {memory} of memory{device}{seconds}", soft_wrap=True)
    if serving is not None:
        console.print(serving_line(serving), soft_wrap=True)


def serving_line(serving: ServingNeeds) -> str:
    """Return one line about GPUs."""
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

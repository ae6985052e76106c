"""What a run says before it works: the method that it chooses, and the limits of its output."""

from __future__ import annotations

from planner.common.progress import Progress
from planner.common.units import GIB
from planner.model.layout import Layout, architecture_of
from planner.model.recognize import why_unserved
from planner.model.source import SourceModel
from planner.model.whole import check_whole
from planner.plan_file import Plan
from planner.planning.methods import PAPER
from planner.planning.request import PlanOptions
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import CODES_PER_BLOCK, GRID, SCHEMES


def announce(options: PlanOptions, progress: Progress) -> None:
    """Name the method that ``auto`` chooses."""
    if options.method != "auto":
        return
    if options.resolved_method == PAPER:
        progress.line(f"method auto: no calibration given, so {PAPER}, the paper's rule; --data TEXT chooses better")
    else:
        progress.line(
            f"method auto: calibration given, so {options.resolved_method}; the paper's rule is --method {PAPER}"
        )


def refuse_incomplete(source: SourceModel, layout: Layout, progress: Progress) -> None:
    """Refuse a source that lacks tensors of its architecture; say so where there is no class to compare it with.

    Raises:
        MoeqError: see :func:`check_whole`.
    """
    unchecked = check_whole(source, layout)
    if unchecked is not None:
        progress.line(f"note: only experts and routers were checked for completeness: {unchecked}")


def note_limits(source: SourceModel, layout: Layout, progress: Progress) -> None:
    """Name the limits of the output before the work starts."""
    row = architecture_of(source)
    if row.recognized is not None:
        progress.line(f"note: {row.recognized}")
    if row.unloaded is not None:
        progress.line(f"note: neither vLLM nor transformers can run it quantized: {row.unloaded}")
    elif (reason := why_unserved(source.config)) is not None:
        progress.line(f"note: vLLM cannot serve it: {reason}; transformers can load it (import vllm_moeq.hf)")
    if layout.odd:
        shape = list(source.shards.info(layout.odd[0]).shape)
        progress.line(
            f"note: linears whose input dimension {CODES_PER_BLOCK} does not divide stay in 16 bits: "
            f"{len(layout.odd)}, the first {layout.odd[0]} {shape}"
        )
    if layout.dense:
        progress.line(
            f"note: linears of Mamba blocks stay in 16 bits, as vLLM takes no others: {len(layout.dense)}, "
            f"the first {layout.dense[0]}"
        )
    if layout.left_out:
        progress.line(f"note: {len(layout.left_out)} tensors of layers for speculative decoding are left out")
    if layout.speculative:
        size = sum(source.shards.info(name).nbytes for name in layout.speculative)
        progress.line(
            f"note: layers for speculative decoding stay in 16 bits: {len(layout.speculative)} tensors, "
            f"{size / GIB:.3g} GiB"
        )


def note_schemes(settings: QuantizeSettings, plan: Plan, progress: Progress) -> None:
    """Say so where another scheme than the grid was wanted, and no expert has a width that it has."""
    name = settings.with_plan(plan).scheme
    able = SCHEMES[name].widths
    if name != GRID.name and not any(bits in able for widths in plan.experts.values() for bits in widths):
        progress.line(
            f"note: no expert is stored as a {name}, which has the widths {', '.join(map(str, able))}: "
            "all are grids in a rotated basis"
        )

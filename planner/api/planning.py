"""``planner.plan``: a width for every expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from planner.api import notes
from planner.api.call import takes
from planner.api.keywords.codes import QuantizerKeyword, SchemeKeyword, StorageKeywords
from planner.api.keywords.common import PathName
from planner.api.keywords.running import RunKeywords
from planner.api.keywords.text import TextKeywords
from planner.api.presets import PresetKeywords, with_preset
from planner.api.results import Estimate, Planned
from planner.api.served import possible_serving
from planner.calibration.reading.text import CalibrationText
from planner.common.progress import Progress
from planner.common.units import GIB
from planner.estimates import Reading, Service
from planner.estimates.paper_formula import ConfigSizes, config_sizes
from planner.estimates.parts import planning_parts
from planner.estimates.quantizing import plan_needs
from planner.model.layout import Layout, read_layout
from planner.model.sizes import Sizes, estimate
from planner.model.skeleton import ConfigModel, open_model
from planner.model.source import SourceModel
from planner.output.paths import check_file
from planner.plan_file import Plan
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions, check_options
from planner.planning.statistics import discard_statistics, with_statistics
from planner.quantization.quantizers import QUANTIZERS
from planner.quantization.quantizers.linear import default_linear_quantizer
from planner.quantization.quantizers.table import possible_schemes
from planner.quantization.settings import QuantizeSettings, check_sizes
from vllm_moeq.format import WHOLE_ROW, UsageError


@dataclass(frozen=True)
class PlanKeywords(PresetKeywords, RunKeywords, SchemeKeyword, StorageKeywords, TextKeywords, QuantizerKeyword):
    """The arguments of :func:`plan`.

    Attributes:
        model: folder or Hub name (owner/name).
        output: file for the plan, plan.json; None writes none.
    """

    model: PathName
    _: KW_ONLY
    output: PathName | None = None


@dataclass(frozen=True)
class _Work:
    """An open model, and what decides its plan."""

    source: SourceModel
    layout: Layout
    settings: QuantizeSettings
    options: PlanOptions
    text: CalibrationText | None
    load: Service
    progress: Progress


@takes(PlanKeywords, "plan")
def plan(wanted: PlanKeywords) -> Planned:
    """Choose a width for every expert, as ``moeq plan`` does; with ``output``, write it, and continue a killed run.

    Raises:
        MoeqError: arguments that cannot be met, a damaged tensor, a full disk; its message is one line.
    """
    where, output = wanted.first_device(), None if wanted.output is None else Path(wanted.output)
    if output is not None:
        check_file(output)
    with _opened(wanted, dry_run=False) as work:
        source, layout, progress = work.source, work.layout, work.progress
        with progress.whole():
            progress.expect(planning_parts(source, layout, work.options, Reading.of(work.text), where))
            with with_statistics(
                source, layout, work.options, work.text, where, output, progress, wanted.resume
            ) as known:
                made = _with_linears(make_plan(source, layout, known, progress), wanted, layout)
        sizes = _sizes(work, made)
    if output is not None:
        made.write(output)
        discard_statistics(output)
    return Planned(made, sizes, output)


def _with_linears(made: Plan, wanted: PlanKeywords, layout: Layout) -> Plan:
    """Return the plan with the width that was asked for all linears, so that quantizing by it needs no flag again."""
    if wanted.linear_bits is None or wanted.linears_compete:
        return made
    names = (name.removesuffix(".weight") for name in layout.linears)
    return made.model_copy(update={"linears": dict.fromkeys(names, int(wanted.linear_bits))})


def estimate_plan(wanted: PlanKeywords) -> Estimate:
    """Return what planning would take: from headers, or from config.json alone.

    Raises:
        MoeqError: as :func:`plan` does.
    """
    where = wanted.first_device()
    if wanted.output is not None:
        raise UsageError("-o and --dry-run: expected one of them, found both")
    with _opened(wanted, dry_run=True) as work:
        source, layout = work.source, work.layout
        made = make_plan(source, layout, work.options, work.progress)
        settings = work.settings.with_plan(made)
        needs = plan_needs(source, layout, work.options, Reading.of(work.text), where)
        check_sizes(source, layout, settings, settings.storage.all_schemes(made.experts))
        found = config_sizes(source, layout, made.experts, settings.group_size, settings.linear, settings.storage)
        serving = possible_serving(source.config, layout, found.ours, work.load, settings.storage)
        return Estimate(needs, made.achieved_avg_bits, found.ours, serving, _formula(work, made, found))


@contextmanager
def _opened(wanted: PlanKeywords, dry_run: bool) -> Iterator[_Work]:
    """Open the model, and yield it with what decides its plan; close it at the end.

    Raises:
        MoeqError: arguments that cannot be met, a damaged model or text.
    """
    progress, given = wanted.display(), wanted.data is not None
    with open_model(str(wanted.model), dry_run) as source:
        layout = read_layout(source)
        notes.refuse_incomplete(source, layout, progress)
        notes.note_limits(source, layout, progress)
        linear, group_size = wanted.linear(source, layout), wanted.checked_group_size()
        quantizer = wanted.resolved_quantizer(given or wanted.stats is not None)  # their text will calibrate it
        settings = QuantizeSettings(
            quantizer,
            group_size=group_size,
            linear=linear,
            linear_quantizer=default_linear_quantizer(QUANTIZERS[quantizer].calibrated),
            scheme=wanted.settled_scheme,
        )
        schemes = possible_schemes(wanted.resolved_scheme, wanted.choices(given))
        # A plan holds for every group size.
        check_sizes(source, layout, replace(settings, group_size=WHOLE_ROW), schemes)
        wanted = with_preset(wanted, source, layout, settings, given)
        options = wanted.plan_options(
            source, layout, settings, text=given, ranked=not dry_run, scheme=wanted.resolved_scheme,
            linears=wanted.linears_compete,
        )  # fmt: skip
        check_options(options)
        text = wanted.read_text(source, wanted.seed, progress) if given else None
        notes.announce(options, progress)
        yield _Work(source, layout, settings, options, text, wanted.service(), progress)


def _sizes(work: _Work, made: Plan) -> Sizes:
    """Return the bytes of the source, and of the checkpoint that a plan makes."""
    settings = work.settings.with_plan(made)
    return estimate(work.source, work.layout, made.experts, settings.group_size, settings.linear, settings.storage)


def _formula(work: _Work, made: Plan, found: ConfigSizes) -> dict[str, Any]:
    """Return the numbers of weights and the GiB of a model without weights; nothing for one that has some."""
    if not isinstance(work.source, ConfigModel):
        return {}
    widths = Counter(bits for row in made.experts.values() for bits in row)
    totals = {"bf16": found.bf16_bytes, "ours": found.ours.total_bytes, "paper": found.paper_bytes}
    return {
        "model": str(work.source.folder),
        "model_type": work.layout.model_type,
        "weights": {**asdict(found.counts), "total": found.counts.total},
        "experts_per_width": {str(bits): widths[bits] for bits in made.bit_choices},
        "gib": {name: count / GIB for name, count in totals.items()},
    }

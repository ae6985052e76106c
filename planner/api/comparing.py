"""``planner.compare``: which allocation is best for a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from planner.api import notes
from planner.api.call import takes
from planner.api.keywords.codes import ComparedCodeKeywords, StorageKeywords
from planner.api.keywords.common import PathName, ProgressKeyword
from planner.api.keywords.comparison import CandidateKeywords, MeasureKeywords
from planner.api.keywords.running import CompareRunKeywords
from planner.api.keywords.text import ComparedTextKeywords
from planner.api.results import Compared, Estimate
from planner.calibration.reading.text import longest_text
from planner.common.memory import return_large_blocks
from planner.common.progress import Progress
from planner.comparison.compare import compare as run_comparison
from planner.comparison.entries import possible
from planner.comparison.report import write_report
from planner.comparison.request import Comparison, ComparisonRun
from planner.estimates.comparison import compare_needs
from planner.evaluation.perplexity import read_texts, read_tokens
from planner.model.layout import Layout, read_layout
from planner.model.skeleton import open_model
from planner.model.source import SourceModel
from planner.output.paths import check_output
from planner.planning.methods import METHODS
from planner.quantization.quantizers import QUANTIZERS
from planner.quantization.quantizers.table import possible_schemes
from planner.quantization.settings import QuantizeSettings, check_sizes
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class CompareKeywords(
    ProgressKeyword,
    CompareRunKeywords,
    StorageKeywords,
    MeasureKeywords,
    ComparedTextKeywords,
    ComparedCodeKeywords,
    CandidateKeywords,
):
    """The arguments of :func:`compare`.

    Attributes:
        model: folder or Hub name (owner/name).
        held_out: file of the text to evaluate on, as for ``data``.
        output: folder for table, CSV, JSON and plot.
    """

    model: PathName
    _: KW_ONLY
    held_out: PathName
    output: PathName


@dataclass(frozen=True)
class _Work:
    """An open model, and what is to be compared.

    Attributes:
        output: the folder to create.
        source: the model.
        layout: its layers.
        wanted: the comparison.
        content: the held-out texts.
        device: the device that computes.
        progress: shows how far the work is.
    """

    output: Path
    source: SourceModel
    layout: Layout
    wanted: Comparison
    content: tuple[str, ...]
    device: torch.device
    progress: Progress


@takes(CompareKeywords, "compare")
def compare(wanted: CompareKeywords) -> Compared:
    """Quantize a model by several methods and measure what each costs, as ``moeq compare`` does. Continue a killed run.

    Raises:
        MoeqError: arguments that cannot be met, a damaged model or text, a full disk; its message is one line.
    """
    with _opened(wanted, dry_run=False) as work:
        return_large_blocks()
        rows = run_comparison(
            work.source, work.layout, work.wanted, work.content, work.output, work.device, work.progress,
            wanted.resume,
            lambda rows: write_report(work.output, rows, work.wanted, str(work.source.folder), work.progress),
            wanted.jobs,
        )  # fmt: skip
    return Compared(work.output, rows)


def estimate_compare(wanted: CompareKeywords) -> Estimate:
    """Return what a comparison would take, from the headers.

    Raises:
        MoeqError: as :func:`compare` does.
    """
    with _opened(wanted, dry_run=True) as work:
        comparison = ComparisonRun(
            work.source, work.layout, work.wanted, work.output, work.device, work.progress, wanted.jobs
        )
        possible(comparison)
        tokens = len(read_tokens(work.source.folder, work.content, work.wanted.max_tokens, "--held-out"))
        return Estimate(compare_needs(comparison, tokens))


@contextmanager
def _opened(wanted: CompareKeywords, dry_run: bool) -> Iterator[_Work]:
    """Open the model, and yield it with what is to be compared; close it at the end.

    Raises:
        MoeqError: arguments that cannot be met, a damaged model or text.
    """
    progress, where, names, output = wanted.display(), wanted.first_device(), wanted.names(), Path(wanted.output)
    check_output(output)
    with open_model(str(wanted.model), dry_run) as source:
        layout = read_layout(source)
        notes.refuse_incomplete(source, layout, progress)
        settings = _settings(source, layout, names, wanted)
        content = read_texts(Path(wanted.held_out), source.folder)
        _check_text(source, names, settings, wanted)
        yield _Work(output, source, layout, _comparison(names, settings, wanted), content, where, progress)


def _settings(source: SourceModel, layout: Layout, names: tuple[str, ...], wanted: CompareKeywords) -> QuantizeSettings:
    """Return the settings with which every candidate is quantized.

    Raises:
        MoeqError: impossible sizes of groups, or input dimensions that cannot be packed.
    """
    if wanted.linears_compete:
        raise UsageError("--linear-bits auto: expected 4, 8 or 16, the same for every method, found auto")
    settings = QuantizeSettings(
        wanted.quantizer,
        wanted.one_bit,
        wanted.checked_group_size(),
        wanted.linear(source, layout),
        gptq=wanted.gptq_settings(),
        min_tokens=wanted.min_tokens,
        linear_quantizer=wanted.resolved_linear_quantizer(QUANTIZERS[wanted.quantizer].calibrated),
        calibration=wanted.resolved_calibration(),
    )
    widths = wanted.choices() or [bits for name in names for bits in METHODS[name].choices]
    for choice in wanted.schemes():
        check_sizes(source, layout, settings, possible_schemes(choice, widths))
    return settings


def _check_text(
    source: SourceModel, names: tuple[str, ...], settings: QuantizeSettings, wanted: CompareKeywords
) -> None:
    """Refuse a comparison without the text that it needs, and sequences that the model cannot read.

    Raises:
        UsageError: naming the argument.
    """
    needs = [name for name in names if METHODS[name].calibrated or METHODS[name].only_compared]
    if wanted.data is None and (needs or settings.calibrated):
        what = f"--quantizer {settings.quantizer}" if settings.calibrated else f"--methods {','.join(needs)}"
        raise UsageError(f"{what}: expected --data TEXT to calibrate on, found none")
    longest, window = longest_text(source), wanted.window
    read = {"--window": window} if wanted.data is None else {"--seq-len": wanted.seq_len, "--window": window}
    for flag, value in read.items():
        if value > longest:
            raise UsageError(f"{flag}: expected at most {longest}, the model's longest text, found {value}")


def _comparison(names: tuple[str, ...], settings: QuantizeSettings, wanted: CompareKeywords) -> Comparison:
    """Return the request for the comparison; raise UsageError for a list that cannot be read."""
    return Comparison(
        methods=names,
        averages=wanted.averages(),
        bit_choices=wanted.choices(),
        settings=settings,
        data=None if wanted.data is None else str(wanted.data),
        samples=wanted.samples,
        length=wanted.seq_len,
        seeds=wanted.seeds,
        window=wanted.window,
        max_tokens=wanted.max_tokens,
        tasks=wanted.task_names(),
        limit=wanted.limit,
        odp=wanted.thresholds(),
        schemes=wanted.schemes(),
    )

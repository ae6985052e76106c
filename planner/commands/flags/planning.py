"""The flags that say how widths are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from planner.allocation.levels import Counts
from planner.allocation.order import Promotion
from planner.calibration.statistics import described_widths
from planner.commands.completion import one_of
from planner.commands.flags.common import Bits, Seed
from planner.commands.flatten import OneOf
from planner.estimates.presets import PRESETS
from planner.model.layout import Layout
from planner.model.sizes import average_for_budget
from planner.model.source import SourceModel
from planner.planning.method import Method, Scope
from planner.planning.methods import METHODS, OURS, PAPER
from planner.planning.request import PlanOptions, check_choices, check_options, read_overrides, resolved_method
from planner.planning.scores import read_observed
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import BIT_WIDTHS, UsageError

AVERAGE = "2.5"
"""Average bits per expert weight, unless a flag says otherwise."""


def read_average(text: str) -> Fraction:
    """Return the exact decimal. Values out of range are refused here, before they become huge integers.

    Raises:
        UsageError: no number, or out of range.
    """
    low, high = min(BIT_WIDTHS), max(BIT_WIDTHS)
    try:
        if low <= float(text) <= high:
            return Fraction(text)
    except ValueError:
        pass
    raise UsageError(f"--avg-bits: expected a number between {low} and {high}, found {text!r}")


def read_choices(text: str) -> tuple[int, ...]:
    """Return the widths in a list such as 1,2,3, ascending.

    Raises:
        UsageError: not such a list, a width that the format does not have, or twice the same.
    """
    try:
        return check_choices([int(part) for part in text.split(",")])
    except ValueError:
        raise UsageError(f"--bits: expected widths such as 1,2,3, found {text!r}") from None


def _check_file(stats: Path) -> None:
    """Refuse what is no file of statistics; raise UsageError for it."""
    if stats.suffix == ".json":
        raise UsageError(f"--stats: {stats}: expected the .safetensors file of moeq calibrate, found its description")
    if not stats.is_file():
        raise UsageError(f"--stats: {stats}: expected a file that moeq calibrate writes, found none")


def _check(options: PlanOptions, layout: Layout) -> None:
    """Check that a plan can be made with the options, also where a dry run makes none.

    Raises:
        MoeqError: the options cannot be met, or the method's statistics are missing or those of another model.
    """
    check_options(options)
    name = options.resolved_method
    method = METHODS[name]
    if method.only_compared:
        raise UsageError(f"--method {name}: {method.only_compared}")
    if options.stats is not None:
        read_observed(options.stats, layout, method, options)
    elif method.calibrated and not options.calibrated:
        raise UsageError(f"--method {name}: expected --data TEXT, or --stats FILE of moeq calibrate, found neither")


@dataclass(frozen=True)
class PlanFlags:
    """The choice of widths."""

    avg_bits: Annotated[
        str | None, typer.Option("--avg-bits", metavar="B", help=f"Average bits per expert weight [{AVERAGE}].")
    ] = None
    budget_gib: Annotated[
        float | None,
        typer.Option("--budget-gib", metavar="GIB", help="Instead of --avg-bits: GiB that all weights may take."),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help=f"Flags for a number of bits, or for what one GPU holds beside the cache: {', '.join(PRESETS)}.",
        ),
        OneOf(PRESETS),
    ] = None
    bits: Bits = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            autocompletion=one_of(("auto", *METHODS)),
            help=f"Rule for the choice: auto ({OURS} with a text or statistics, else the paper's {PAPER}), "
            f"{', '.join(METHODS)}.",
        ),
    ] = PlanOptions.method
    zeta: Annotated[
        float, typer.Option("--zeta", help="Promote an expert whose MaxVar is more than this times another's (ζ).")
    ] = PlanOptions.zeta
    promotion: Annotated[Promotion, typer.Option("--promotion", help="Order among several promoted experts.")] = (
        "official"
    )
    counts: Annotated[Counts, typer.Option("--counts", help="Experts per width: the paper's rule or its code's.")] = (
        "paper"
    )
    ranking: Annotated[
        Scope | None,
        typer.Option("--ranking", help="Experts compete within each layer, or all together [the method's]."),
    ] = None
    initial_model: Annotated[
        Path | None,
        typer.Option("--initial-model", metavar="DIR", help="Model before training: rank by the change of norm."),
    ] = None
    stats: Annotated[
        Path | None,
        typer.Option("--stats", metavar="FILE", help="Statistics that moeq calibrate wrote, instead of a text."),
    ] = None
    overrides: Annotated[
        Path | None,
        typer.Option("--overrides", metavar="FILE", help='JSON of fixed widths: {"<experts prefix>.3": 3}.'),
    ] = None
    seed: Seed = PlanOptions.seed

    def options(
        self, model: SourceModel, layout: Layout, settings: QuantizeSettings, *, text: bool, ranked: bool
    ) -> PlanOptions:
        """Return the options of the plan.

        Args:
            model: the source.
            layout: its layers.
            settings: how it will be quantized.
            text: whether a calibration text is given.
            ranked: whether experts are ranked; a dry run ranks none.

        Raises:
            MoeqError: a flag that is no number, names no file, excludes another, or lacks what its method needs.
        """
        if self.stats is not None:
            _check_file(self.stats)
        choices = self.choices(text)
        average = self._average(model, layout, settings, choices)
        if self.initial_model is not None and not self.initial_model.is_dir():
            raise UsageError(f"--initial-model: {self.initial_model}: expected a folder, found none")
        made = PlanOptions(
            avg_bits=average,
            bit_choices=choices,
            method=self.method,
            zeta=self.zeta,
            promotion=self.promotion,
            counts=self.counts,
            ranking=self.ranking,
            initial_model=self.initial_model,
            stats=self.stats,
            budget_gib=self.budget_gib,
            overrides=read_overrides(self.overrides, layout, choices) if self.overrides else {},
            seed=self.seed,
            quantizer=settings.quantizer,
            ranked=ranked,
            calibrated=text,
        )
        _check(made, layout)
        return made

    def choices(self, text: bool) -> tuple[int, ...]:
        """Return the widths to choose from.

        Args:
            text: whether a calibration text is given.

        Raises:
            UsageError: not a list of widths, or one that the format does not have.
        """
        return self._own_choices(text) if self.bits is None else read_choices(self.bits)

    def _own_choices(self, text: bool) -> tuple[int, ...]:
        """Return the widths that the method chooses from, or those that its statistics have."""
        name = resolved_method(self.method, self.stats is not None or text)
        method = METHODS.get(name, Method())
        known = [] if self.stats is None or not method.measures else described_widths(self.stats)
        if not known or set(method.choices) <= set(known):
            return method.choices
        return check_choices(known, f"{self.stats}: widths")

    def _average(
        self, model: SourceModel, layout: Layout, settings: QuantizeSettings, choices: tuple[int, ...]
    ) -> Fraction:
        """Return the average, as it is given or as the budget allows."""
        if self.budget_gib is None:
            return read_average(AVERAGE if self.avg_bits is None else self.avg_bits)
        if self.avg_bits is not None:
            raise UsageError("--avg-bits and --budget-gib: expected one of them, found both")
        average = average_for_budget(
            model, layout, self.budget_gib, choices, settings.group_size, settings.linear, settings.scheme
        )
        if self.method in METHODS and METHODS[self.method].one_width:
            return Fraction(max(width for width in choices if width <= average))
        return average

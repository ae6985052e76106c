"""The keyword arguments that say how widths are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from planner.allocation.levels import Counts
from planner.allocation.order import Promotion
from planner.api.keywords.common import PathName, one_of, parts
from planner.calibration.statistics import described_widths
from planner.estimates.presets import PRESETS
from planner.model.layout import Layout
from planner.model.sizes import average_for_budget
from planner.model.source import SourceModel
from planner.planning.method import Method, Scope
from planner.planning.methods import METHODS
from planner.planning.request import (
    LinearChoice,
    PlanOptions,
    check_choices,
    check_options,
    check_overrides,
    read_overrides,
    resolved_method,
)
from planner.planning.scores import read_observed
from planner.quantization.quantizers.table import AUTO_SCHEME, SchemeChoice
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import BIT_WIDTHS, UsageError

AVERAGE = "2.5"
"""Average bits per expert weight, unless a keyword says otherwise."""

Number = float | Fraction | str
"""A number, or its digits."""

WidthList = Sequence[int] | str
"""Widths such as ``(1, 2, 3)``, or a flag's text."""


def read_average(given: Number) -> Fraction:
    """Return the exact decimal. Values out of range are refused here, before they become huge integers.

    Raises:
        UsageError: no number, or out of range.
    """
    low, high = min(BIT_WIDTHS), max(BIT_WIDTHS)
    try:
        if low <= float(given) <= high:
            return given if isinstance(given, Fraction) else Fraction(str(given))
    except ValueError:
        pass
    found = f"{given:g}" if isinstance(given, float | int) else repr(str(given))
    raise UsageError(f"--avg-bits: expected a number between {low} and {high}, found {found}")


def read_choices(given: WidthList) -> tuple[int, ...]:
    """Return the widths of a list, ascending.

    Raises:
        UsageError: not such a list, a width that the format does not have, or twice the same.
    """
    try:
        return check_choices([int(part) for part in parts(given)])
    except ValueError:
        raise UsageError(f"--bits: expected widths such as 1,2,3, found {given!r}") from None


@dataclass(frozen=True, kw_only=True)
class WidthKeywords:
    """The choice of widths.

    Attributes:
        avg_bits: average bits per expert weight, exactly as its digits say; None is 2.5, or what the budget allows.
        budget_gib: instead of ``avg_bits``: GiB that all weights may take.
        preset: arguments for a size or a GPU: ``2bit``, ``2.5bit``, ``3bit``, ``24gb``, ``80gb``.
        bits: widths to choose from, such as ``(1, 2, 3)``; None takes the method's own.
        method: ``auto``, or a method's name, such as ``kl`` or ``router-norm-maxvar``.
        zeta: promote an expert whose MaxVar is more than this times another's.
        promotion: order among several promoted experts.
        counts: experts per width: the paper's rule, or its code's.
        ranking: whether experts compete within each layer or over all; None is what the method does.
        initial_model: folder of the model before training: rank by the change of router norm.
        stats: what :func:`planner.calibrate` wrote, instead of a text.
        overrides: fixed widths, ``{"<experts prefix>.3": 3}``, or a JSON file of them.
        seed: seed of random orders and of the choice of calibration sequences.
    """

    avg_bits: Number | None = None
    budget_gib: float | None = None
    preset: Annotated[str, one_of(PRESETS)] | None = None
    bits: WidthList | None = None
    method: str = PlanOptions.method
    zeta: float = PlanOptions.zeta
    promotion: Promotion = "official"
    counts: Counts = "paper"
    ranking: Scope | None = None
    initial_model: PathName | None = None
    stats: PathName | None = None
    overrides: Mapping[str, int] | PathName | None = None
    seed: int = PlanOptions.seed

    def plan_options(
        self,
        model: SourceModel,
        layout: Layout,
        settings: QuantizeSettings,
        *,
        text: bool,
        ranked: bool,
        scheme: SchemeChoice = "grid",
        linears: bool = False,
    ) -> PlanOptions:
        """Return the options of the plan.

        Args:
            model: the source.
            layout: its layers.
            settings: how it will be quantized.
            text: whether a calibration text is given.
            ranked: whether experts are ranked; an estimate ranks none.
            scheme: the scheme of experts, or ``auto``.
            linears: whether linears compete with experts.

        Raises:
            MoeqError: a keyword that is no number, names no file, excludes another, or lacks what its method needs.
        """
        stats = None if self.stats is None else _statistics(Path(self.stats))
        choices = self.choices(text)
        average = self._average(model, layout, settings, choices)
        initial = None if self.initial_model is None else Path(self.initial_model)
        if initial is not None and not initial.is_dir():
            raise UsageError(f"--initial-model: {initial}: expected a folder, found none")
        made = PlanOptions(
            avg_bits=average,
            bit_choices=choices,
            method=self.method,
            zeta=self.zeta,
            promotion=self.promotion,
            counts=self.counts,
            ranking=self.ranking,
            initial_model=initial,
            stats=stats,
            budget_gib=self.budget_gib,
            overrides=self._fixed(layout, choices),
            seed=self.seed,
            quantizer=settings.quantizer,
            ranked=ranked,
            calibrated=text,
            linears=LinearChoice(settings.linear.group_size, settings.linear_quantizer) if linears else None,
            scheme=scheme,
            group_size=settings.group_size,
            trellis_bits=self._trellis_bits(model, layout, settings, choices) if scheme == AUTO_SCHEME else None,
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
        if self.bits is not None:
            return read_choices(self.bits)
        return self._own_choices(None if self.stats is None else _statistics(Path(self.stats)), text)

    def _own_choices(self, stats: Path | None, text: bool) -> tuple[int, ...]:
        """Return the widths that the method chooses from, or those that its statistics have."""
        name = resolved_method(self.method, stats is not None or text)
        method = METHODS.get(name, Method())
        known = [] if stats is None or not method.measures else described_widths(stats)
        if not known or set(method.choices) <= set(known):
            return method.choices
        return check_choices(known, f"{stats}: widths")

    def _average(
        self, model: SourceModel, layout: Layout, settings: QuantizeSettings, choices: tuple[int, ...]
    ) -> Fraction:
        """Return the average, as it is given or as the budget allows."""
        if self.budget_gib is None:
            return read_average(AVERAGE if self.avg_bits is None else self.avg_bits)
        if self.avg_bits is not None:
            raise UsageError("--avg-bits and --budget-gib: expected one of them, found both")
        average = average_for_budget(
            model, layout, self.budget_gib, choices, settings.group_size, settings.linear, settings.storage
        )
        if self.method in METHODS and METHODS[self.method].one_width:
            return Fraction(max(width for width in choices if width <= average))
        return average

    def _trellis_bits(
        self, model: SourceModel, layout: Layout, settings: QuantizeSettings, choices: tuple[int, ...]
    ) -> Fraction | None:
        """Return the average that a budget allows with trellises; None without a budget."""
        if self.budget_gib is None:
            return None
        return self._average(model, layout, replace(settings, scheme="trellis"), choices)

    def _fixed(self, layout: Layout, choices: tuple[int, ...]) -> Mapping[str, int]:
        """Return the fixed widths; raise ConfigError for an unknown expert, or a width that is no choice."""
        if self.overrides is None:
            return {}
        if isinstance(self.overrides, Mapping):
            return check_overrides(dict(self.overrides), "--overrides", layout, choices)
        return read_overrides(Path(self.overrides), layout, choices)


def _statistics(stats: Path) -> Path:
    """Return the path; raise UsageError for what is no file of statistics."""
    if stats.suffix == ".json":
        raise UsageError(f"--stats: {stats}: expected the .safetensors file of moeq calibrate, found its description")
    if not stats.is_file():
        raise UsageError(f"--stats: {stats}: expected a file that moeq calibrate writes, found none")
    return stats


def _check(options: PlanOptions, layout: Layout) -> None:
    """Check that a plan can be made with the options, also where an estimate makes none.

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

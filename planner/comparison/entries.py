"""Make the plans to compare, and measure the cost of making them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from planner.calibration.collect import StatisticsRequest, collect
from planner.calibration.measures import check_measures
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import calibration_facts
from planner.calibration.statistics import json_path
from planner.common.memory import resident_bytes
from planner.common.progress import Progress
from planner.comparison.request import Comparison, ComparisonRun
from planner.plan_file import Plan, read_plan
from planner.planning.make import make_plan
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions, check_options
from planner.quantization.quantizers.table import POSSIBLE, SchemeChoice
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import BIT_WIDTHS, UsageError

QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Entry:
    """One cell of the comparison.

    Attributes:
        method: name of the method.
        average: requested average bits per expert weight.
        seed: seed for random orders and for the choice of calibration text.
        plan: the plan; None for slim, whose widths per group no plan can hold.
        cost: seconds, bytes of memory and forward passes for the choice of widths.
        odp: see :class:`planner.comparison.candidates.Candidate`.
        scheme: the scheme of experts that was asked for.
    """

    method: str
    average: Fraction
    seed: int
    plan: Plan | None
    cost: dict[str, float]
    odp: float = 0.0
    scheme: SchemeChoice = "grid"

    def settings(self, wanted: Comparison) -> QuantizeSettings:
        """Return the settings with which the entry's model is quantized."""
        found = wanted.settings_of(self.scheme)
        return found if self.plan is None else found.with_plan(self.plan)


def entries(run: ComparisonRun) -> list[Entry]:
    """Return the entries of all methods, method by method. Entries with equal widths are all kept.

    Raises:
        MoeqError: flags that a method cannot meet.
    """
    found: list[Entry] = []
    for name, averages in possible(run).items():
        for scheme in schemes_of(run, name):
            for seed in range(run.wanted.seeds if varies(name) else 1):
                found += _of_method(run, name, averages, seed, scheme)
    return found


def possible(run: ComparisonRun) -> dict[str, list[Fraction]]:
    """Return method → the averages that it can give, before anything is calibrated; say which it cannot.

    Raises:
        MoeqError: flags that a method cannot meet, or no method gives any average.
    """
    wanted = run.wanted
    if not any(gives(name, average) for name in wanted.methods for average in wanted.averages):
        raise UsageError(
            f"--avg-bits: expected a width among {', '.join(map(str, BIT_WIDTHS))} for --methods "
            f"{','.join(wanted.methods)}, found {', '.join(f'{float(average):g}' for average in wanted.averages)}"
        )
    if not any(schemes_of(run, name) for name in wanted.methods):
        able = " or ".join(name for name, method in METHODS.items() if method.gains is not None)
        raise UsageError(
            f"--scheme {','.join(wanted.schemes)}: expected --methods with {able}, found {','.join(wanted.methods)}"
        )
    given: dict[str, list[Fraction]] = {}
    for name in wanted.methods:
        averages = [average for average in run.wanted.averages if gives(name, average)]
        for average in run.wanted.averages:
            if average not in averages:
                run.progress.line(f"{name}: not at {float(average):g} bits, which one width for all does not give")
        for scheme in wanted.schemes:
            if scheme not in schemes_of(run, name):
                run.progress.line(f"{name}: not with --scheme {scheme}, which it does not measure")
        check_measures(measures_of(run, name), run.model, run.layout, run.device)
        for scheme in schemes_of(run, name):
            for average in averages:
                check_options(_options(run, name, average, 0, None, scheme))
        given[name] = averages
    return given


def _options(
    run: ComparisonRun, name: str, average: Fraction, seed: int, stats: Path | None, scheme: SchemeChoice
) -> PlanOptions:
    choices, settings = (int(average),) if whole_bits(name) else choices_of(run, name), run.wanted.settings
    return PlanOptions(
        average, choices, method=name, stats=stats, seed=seed, quantizer=settings.quantizer, scheme=scheme,
        group_size=settings.group_size,
    )  # fmt: skip


def schemes_of(run: ComparisonRun, name: str) -> tuple[SchemeChoice, ...]:
    """Return the schemes in which a method's plans are made.

    What no checkpoint can hold has grids alone. A choice of schemes needs a method that measures them.
    """
    method = METHODS[name]
    if method.only_compared:
        return ("grid",)
    return tuple(it for it in run.wanted.schemes if len(POSSIBLE[it]) == 1 or method.gains is not None)


def measures_of(run: ComparisonRun, name: str) -> tuple[str, ...]:
    """Return the measures that a method needs for all of the schemes; a plan's cost counts those of its own scheme."""
    method = METHODS[name]
    others = (measure for scheme in schemes_of(run, name) for measure in method.other_measures(scheme))
    return tuple(dict.fromkeys((*method.measures, *others)))


def varies(name: str) -> bool:
    """Tell whether a method's result depends on the seed."""
    return METHODS[name].random or METHODS[name].calibrated or bool(METHODS[name].only_compared)


def whole_bits(name: str) -> bool:
    """Tell whether a method only takes averages that are widths of the format."""
    return METHODS[name].one_width or bool(METHODS[name].only_compared)


def gives(name: str, average: Fraction) -> bool:
    """Tell whether a method can make a plan with this average."""
    if whole_bits(name):
        return average.denominator == 1 and int(average) in BIT_WIDTHS
    return True


def _of_method(
    run: ComparisonRun, name: str, averages: list[Fraction], seed: int, scheme: SchemeChoice
) -> Iterator[Entry]:
    """Yield a method's plans for one seed and scheme. The cost of calibration counts for each plan."""
    method = METHODS[name]
    stats = _statistics(run, name, seed) if method.calibrated and averages else None
    for average in averages:
        if method.only_compared:
            yield Entry(name, average, seed, None, {})
            continue
        options = _options(run, name, average, seed, stats, scheme)
        widths = "".join(map(str, options.bit_choices))
        path = run.folder / f"plan-{name}-{widths}-{float(average):g}-{seed}-{scheme}.json"
        if not path.is_file():
            idle = resident_bytes()
            plan = make_plan(run.model, run.layout, options, QUIET)
            plan.cost["added_bytes"] = max(0.0, plan.cost["peak_bytes"] - idle)
            plan.write(path)
        plan = read_plan(path)
        cost = {
            "seconds": plan.cost["seconds"] + plan.cost.get("calibration_seconds", 0.0),
            "bytes": max(plan.cost["added_bytes"], plan.cost.get("calibration_added_bytes", 0.0)),
            "forward_passes": float(method.calibrated),
        }
        yield Entry(name, average, seed, plan, cost, scheme=scheme)


def choices_of(run: ComparisonRun, name: str) -> tuple[int, ...]:
    """Return the widths that a method chooses from, in bits."""
    return run.wanted.bit_choices or METHODS[name].choices


def _statistics(run: ComparisonRun, name: str, seed: int) -> Path:
    """Return the file of statistics for a seed's calibration text, after collecting them if needed.

    Only the method's own measures are collected, so that its cost contains no others.
    """
    measures, choices = measures_of(run, name), choices_of(run, name)
    known = "-".join(("statistics", *measures, "".join(map(str, choices)) if measures else "counts", str(seed)))
    path = run.folder / f"{known}.safetensors"
    if not (path.is_file() and json_path(path).is_file()):
        wanted = StatisticsRequest(measures, choices, seed)
        text, facts = run.text(seed), calibration_facts(run.text(seed), run.device)
        dtype = compute_dtype(run.device)
        run.progress.line(f"{name}: calibrating, seed {seed}")
        began = time.monotonic()
        collect(run.model, run.layout, text, path, facts, run.device, dtype, QUIET, wanted=wanted)
        run.progress.line(f"{name}: {time.monotonic() - began:.1f} s")
    return path

"""The keyword arguments of a comparison: its candidates, and their measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from planner.api.keywords.common import Count, Tokens, parts
from planner.api.keywords.tasks import TaskList
from planner.api.keywords.widths import Number, WidthList, read_average, read_choices
from planner.comparison.request import Comparison
from planner.evaluation.lm_eval_tasks import check_tasks
from planner.planning.methods import METHODS
from planner.quantization.quantizers.table import SchemeChoice
from vllm_moeq.format import UsageError


@dataclass(frozen=True, kw_only=True)
class CandidateKeywords:
    """The plans that are compared.

    Attributes:
        methods: names of methods, such as ``("kl", "pmq")``, or ``all``.
        avg_bits: average bits per expert weight, one or several.
        bits: widths to choose from, such as ``(1, 2, 3)``; None takes each method's own.
        scheme: how experts are stored: ``grid``, ``trellis``, ``auto``, or several: every plan is made in each.
    """

    methods: Sequence[str] | str = "all"
    avg_bits: Number | Sequence[Number] = (2, 2.5)
    bits: WidthList | None = None
    scheme: Sequence[str] | str = Comparison.schemes

    def schemes(self) -> tuple[SchemeChoice, ...]:
        """Return the schemes, each once.

        Raises:
            UsageError: an unknown one.
        """
        known: dict[str, SchemeChoice] = {name: name for name in get_args(SchemeChoice)}
        names = tuple(dict.fromkeys(parts(self.scheme)))
        for name in names:
            if name not in known:
                raise UsageError(f"--scheme: expected some of {', '.join(known)}, found {name!r}")
        return tuple(known[name] for name in names)

    def names(self) -> tuple[str, ...]:
        """Return the methods, each once.

        Raises:
            UsageError: an unknown one.
        """
        if self.methods == "all":
            return tuple(METHODS)
        names = tuple(dict.fromkeys(parts(self.methods)))
        for name in names:
            if name not in METHODS:
                raise UsageError(f"--methods: expected some of {', '.join(METHODS)}, or all, found {name!r}")
        return names

    def averages(self) -> tuple[Fraction, ...]:
        """Return the averages; raise UsageError for one that is no number or out of range."""
        given = self.avg_bits
        if isinstance(given, str):
            return tuple(read_average(number) for number in parts(given))
        return tuple(read_average(number) for number in (given if isinstance(given, Sequence) else (given,)))

    def choices(self) -> tuple[int, ...] | None:
        """Return the widths to choose from, or None for each method's own; raise UsageError for impossible ones."""
        return None if self.bits is None else read_choices(self.bits)


@dataclass(frozen=True, kw_only=True)
class MeasureKeywords:
    """The measurements of every candidate.

    Attributes:
        window: tokens of context.
        max_tokens: tokens of the held-out text at most; None for all.
        tasks: names of lm-eval's tasks, or YAML files, which may run code.
        limit: documents of each task; None for all.
        odp: thresholds of ODP to evaluate besides, such as ``(0.3, 0.5)``.
    """

    window: Tokens = Comparison.window
    max_tokens: Tokens | None = None
    tasks: TaskList | None = None
    limit: Count | None = None
    odp: Sequence[float] | float | str | None = None

    def task_names(self) -> tuple[str, ...]:
        """Return the tasks' names or files.

        Raises:
            UsageError: one that lm-eval does not know.
        """
        if self.tasks is None:
            return ()
        names = tuple(dict.fromkeys(parts(self.tasks)))
        check_tasks(names)
        return names

    def thresholds(self) -> tuple[float, ...]:
        """Return the thresholds of ODP; raise UsageError for one that is no number or out of range."""
        try:
            values = () if self.odp is None else tuple(float(part) for part in parts(self.odp))
        except ValueError:
            values = (-1.0,)
        if not all(0 < value <= 1 for value in values):
            raise UsageError(f"--odp: expected numbers above 0 and up to 1, such as 0.3,0.5, found {self.odp!r}")
        return values

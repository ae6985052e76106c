"""What the functions return. ``as_dict`` is what ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.comparison.compare import Row
from planner.estimates import Needs, ServingNeeds
from planner.evaluation.record import Divergence, TaskResult, TextResult
from planner.model.sizes import Sizes
from planner.plan_file import Plan
from planner.reporting.facts import Facts
from planner.reporting.value_maps import ValueMaps


@dataclass(frozen=True)
class Planned:
    """A width for every expert.

    Attributes:
        plan: the contents of plan.json.
        sizes: bytes of the source, and of the checkpoint that the plan makes.
        output: the file that was written, if any.
    """

    plan: Plan
    sizes: Sizes
    output: Path | None = None

    @property
    def achieved_avg_bits(self) -> float:
        """The average bits per expert weight."""
        return self.plan.achieved_avg_bits

    def as_dict(self) -> dict[str, Any]:
        """Return the plan and the sizes as JSON values."""
        return {**self.plan.model_dump(mode="json"), "sizes": self.sizes.as_dict()}


@dataclass(frozen=True)
class Quantized:
    """A checkpoint that was written.

    Attributes:
        output: its folder.
        plan: the widths of its experts, and what decided them.
        sizes: bytes of the source, and of the checkpoint.
        serve: the command that serves it; None where vLLM cannot.
    """

    output: Path
    plan: Plan
    sizes: Sizes
    serve: str | None = None

    @property
    def achieved_avg_bits(self) -> float:
        """The average bits per expert weight."""
        return self.plan.achieved_avg_bits

    def as_dict(self) -> dict[str, Any]:
        """Return the average, the sizes, the folder and the widths as JSON values."""
        facts = {"achieved_avg_bits": self.achieved_avg_bits, "sizes": self.sizes.as_dict()}
        linears = {"linears": self.plan.linears} if self.plan.linears else {}
        return {**facts, "output": str(self.output), "experts": self.plan.experts, **linears}


@dataclass(frozen=True)
class Calibrated:
    """Statistics that were written.

    Attributes:
        output: the file, which :func:`planner.plan` and :func:`planner.quantize` take as ``stats``.
        calibration: the facts about the text.
        tokens: experts prefix → the tokens that each expert saw.
    """

    output: Path
    calibration: Mapping[str, Any]
    tokens: Mapping[str, Sequence[int]]

    def as_dict(self) -> dict[str, Any]:
        """Return the file, the text and the tokens as JSON values."""
        return {"output": str(self.output), "calibration": self.calibration, "tokens": self.tokens}


@dataclass(frozen=True)
class Evaluated:
    """The measurements on a model.

    Attributes:
        model: the model, as it was named.
        data: the text, as it was named.
        text: the results on the text, if there is one.
        tasks: the results on tasks, one per task and metric.
    """

    model: str
    data: str | None = None
    text: TextResult | None = None
    tasks: Sequence[TaskResult] = ()

    @property
    def perplexity(self) -> float | None:
        """The perplexity on the text."""
        return None if self.text is None else self.text.perplexity

    @property
    def kl(self) -> Divergence | None:
        """The KL divergence to the reference."""
        return None if self.text is None else self.text.kl

    def as_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        facts: dict[str, Any] = {"model": self.model}
        if self.text is not None:
            facts |= {**self.text.model_dump(mode="json", exclude_none=True), "data": str(self.data)}
        if self.tasks:
            facts["tasks"] = [task.model_dump(mode="json", exclude_none=True) for task in self.tasks]
        return facts


@dataclass(frozen=True)
class Compared:
    """A comparison of methods.

    Attributes:
        output: the folder with the tables, as Markdown, CSV and JSON, and the plot.
        rows: the original, then a row for each method, average and seed, with ``perplexity``, ``kl`` and its tail
            (``kl_99``, ``kl_max``), ``same_top``, ``fallbacks``, ``bytes`` and others.
    """

    output: Path
    rows: list[Row]

    def as_dict(self) -> list[Row]:
        """Return the rows, each as JSON values."""
        return self.rows


@dataclass(frozen=True)
class Reported:
    """A checkpoint's page.

    Attributes:
        report: the page.
        pictures: the pictures beside it.
        facts: what it says of the checkpoint.
        grids: its values per expert.
    """

    report: Path
    pictures: Sequence[Path]
    facts: Facts
    grids: ValueMaps

    def as_dict(self) -> dict[str, Any]:
        """Return the page's content as JSON values."""
        facts, sizes = self.facts, self.facts.sizes
        return {
            "report": str(self.report),
            "pictures": [str(path) for path in self.pictures],
            "source": facts.name,
            "average_bits": facts.average_bits,
            "widths": facts.widths,
            "promoted": facts.num_promoted,
            "fallbacks": facts.num_fallbacks,
            "bytes": {part.title: part.bytes for part in sizes.parts},
            "total_bytes": sizes.total,
            "half_precision_bytes": sizes.half_precision,
            "source_bytes": sizes.source,
            "grids": {grid.key: grid.values for grid in self.grids.known},
            "missing": self.grids.missing,
            "evaluation": facts.evaluations.model_dump(mode="json", exclude_none=True),
        }


@dataclass(frozen=True)
class Estimate:
    """What a call would take.

    Attributes:
        needs: disk, memory and time.
        achieved_avg_bits: average bits per expert weight, where widths are chosen.
        sizes: bytes of the source, and of the checkpoint.
        serving: what serving the checkpoint takes; None if vLLM cannot serve it.
        formula: where the model is its config.json alone, the numbers of its weights, and the GiB by several formulas.
    """

    needs: Needs
    achieved_avg_bits: float | None = None
    sizes: Sizes | None = None
    serving: ServingNeeds | None = None
    formula: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values."""
        facts: dict[str, Any] = dict(self.formula)
        if self.sizes is not None:
            facts |= {"achieved_avg_bits": self.achieved_avg_bits, "sizes": self.sizes.as_dict()}
        facts["needs"] = self.needs.as_dict()
        if self.serving is not None:
            facts["serving"] = self.serving.as_dict()
        return facts

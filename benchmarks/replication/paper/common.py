"""All parts of ``run.py`` use these: the model under test, its evaluation, and the form of results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from planner.calibration.reading.hidden import remove_hidden
from planner.common.progress import Progress
from planner.comparison.compare import Row, rows_of
from planner.comparison.entries import Entry, entries
from planner.comparison.evaluate import evaluate
from planner.comparison.report import tables
from planner.comparison.request import Comparison, ComparisonRun
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.planning.make import make_plan
from planner.planning.methods import METHODS
from planner.planning.request import PlanOptions
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.settings import QuantizeSettings, default_linear

THREE_LEVELS = (1, 2, 3)
"""The widths of Table 1; calibration measures all of them, whatever a part chooses from."""

QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Asked:
    """The flags that decide results.

    Attributes:
        quantizer: gptq or hqq.
        data: calibration text.
        samples: sequences of it.
        length: tokens of each.
        window: tokens of context of the evaluation.
        max_tokens: number of tokens of the held-out text, None for all.
        seeds: number of random orders.
        device: the device that runs layers.
        quick: two averages instead of all.
    """

    quantizer: str
    data: Path
    samples: int = 128
    length: int = 512
    window: int = 512
    max_tokens: int | None = None
    seeds: int = 3
    device: str = "cpu"
    quick: bool = False


@dataclass
class Result:
    """The results of a part.

    Attributes:
        title: its heading.
        lines: Markdown.
        rows: the numbers behind it, for CSV and JSON.
        images: files beside the Markdown that belong to it.
    """

    title: str
    lines: list[str]
    rows: list[dict[str, Any]]
    images: list[str] = field(default_factory=list)


class Bench:
    """One model under test.

    Args:
        model: its checkpoint; beside it ``held_out.txt`` and, for the change of norm, ``initial-router/``.
        output: where its results go.
        asked: the flags.
    """

    def __init__(self, model: SourceModel, output: Path, asked: Asked) -> None:
        self.model, self.folder, self.output, self.asked = model, model.folder, output, asked
        self.text = (model.folder / "held_out.txt").read_text(encoding="utf-8")
        self.layout = read_layout(model)
        self.device = torch.device(asked.device)
        self.progress = Progress()
        initial = model.folder / "initial-router"
        self.initial = initial if initial.is_dir() else None
        self._runs: dict[str, ComparisonRun] = {}

    def some(self, averages: Sequence[str]) -> tuple[Fraction, ...]:
        """Return the averages as exact fractions; two of them if it has to be quick."""
        return tuple(map(Fraction, averages[1:4:2] if self.asked.quick else averages))

    def settings(self, quantizer: str | None = None, linear_bits: int = 4, group_size: int = 128) -> QuantizeSettings:
        """Return how to quantize; by default as the flags and the paper's Mixtral experiments (Appendix B) say."""
        name = quantizer or self.asked.quantizer
        linear = default_linear(self.model, self.layout, linear_bits)
        return QuantizeSettings(name, "sign", group_size, linear, gptq=GptqSettings() if name == "gptq" else None)

    def fingerprint(self, settings: QuantizeSettings | None = None) -> str:
        """Return a digest of everything that decides a result besides the plan."""
        asked = self.asked
        facts = {
            "model": self.model.fingerprint(),
            "settings": (settings or self.settings()).as_dict(),
            "held_out": self.text,
            "calibration": asked.data.read_text(encoding="utf-8"),
            "asked": [asked.samples, asked.length, asked.window, asked.max_tokens, self.device.type],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def run(self, settings: QuantizeSettings | None = None) -> ComparisonRun:
        """Return the run of some settings; its folder keeps every score, so that parts share models."""
        settings = settings or self.settings()
        digest = self.fingerprint(settings)
        if digest not in self._runs:
            asked, folder = self.asked, self.output / "work" / digest
            folder.mkdir(parents=True, exist_ok=True)
            wanted = Comparison(
                (), (), THREE_LEVELS, settings, str(asked.data), asked.samples, asked.length,
                window=asked.window, max_tokens=asked.max_tokens,
            )  # fmt: skip
            self._runs[digest] = ComparisonRun(self.model, self.layout, wanted, folder, self.device, self.progress)
        return self._runs[digest]

    def compared(self, methods: Iterable[str], averages: Sequence[Fraction], seeds: int = 1) -> list[Entry]:
        """Return what ``moeq compare`` would compare, three levels to choose from."""
        run = self.run()
        wanted = replace(run.wanted, methods=tuple(methods), averages=tuple(averages), seeds=seeds)
        return entries(replace(run, wanted=wanted))

    def statistics(self, method: str) -> Path | None:
        """Return the statistics that a method plans by, calibrated once for all widths."""
        if not METHODS[method].calibrated:
            return None
        plan = self.compared((method,), (Fraction(2),))[0].plan
        return Path(plan.settings.stats or "") if plan else None

    def entry(
        self, label: str, average: Fraction, choices: tuple[int, ...], method: str, seed: int = 0, **options: Any
    ) -> Entry:
        """Return a plan by a method, under a label of its own."""
        wanted = PlanOptions(average, choices, method, stats=self.statistics(method), seed=seed, **options)
        plan = make_plan(self.model, self.layout, wanted, QUIET)
        return Entry(label, average, seed, plan, {})

    def rows(self, found: Sequence[Entry], settings: QuantizeSettings | None = None) -> list[Row]:
        """Return the original's row, and one per entry."""
        run = self.run(settings)
        # Evaluated with the calibration text of seed 0: seeds are to show what the order does, not the text.
        shared = [replace(entry, seed=0) for entry in found]
        scores = evaluate(run, shared, [self.text])
        remove_hidden(run.folder)
        original, *rows = rows_of(run, shared, scores)
        return [original, *({**row, "seed": entry.seed} for entry, row in zip(found, rows, strict=True))]


def markdown_table(header: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def by_layer(rows: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return layer → rows of its experts."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["layer"], []).append(row)
    return found


def pivots(rows: Sequence[Row]) -> list[str]:
    """Return perplexity and KL divergence, a line per method and a column per average."""
    lines: list[str] = []
    for title, header, body in tables(rows)[:2]:
        lines += [f"**{title}**", "", *markdown_table(header, body), ""]
    return lines


def conditions(bench: Bench, settings: QuantizeSettings | None = None, seeds: bool = False) -> str:
    """Return sentences that say how models were quantized and evaluated.

    Args:
        bench: the model.
        settings: how to quantize, if not as the flags say.
        seeds: there are random orders among the rows.
    """
    settings, asked = settings or bench.settings(), bench.asked
    groups = "one group per row" if settings.group_size == -1 else f"groups of {settings.group_size}"
    tokens = f"the first {asked.max_tokens:,} tokens of the" if asked.max_tokens else "the whole"
    random = f"; for random orders standard deviation over {asked.seeds} seeds" if seeds else ""
    return (
        f"{settings.quantizer}, one bit by {settings.one_bit}, {groups}, other linears at {settings.linear.bits} bits; "
        f"calibration on {asked.samples} × {asked.length} tokens of {asked.data.name}; {tokens} held-out text in "
        f"windows of {asked.window}. ±: standard error over windows{random}."
    )

"""Make the tables that page and card share, and write them as HTML and as Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from planner.common.units import size
from planner.evaluation.record import Evaluations, TextResult
from planner.quantization.record import printable, without_folder
from planner.reporting.facts import Facts
from planner.reporting.scale import number

MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")
LIMIT = 160
"""Maximum number of characters of a shown name. Longer names end with an ellipsis."""


@dataclass(frozen=True)
class Table:
    """Rows under a header. The first column is text; the other columns are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self, lead: Callable[[int], str] = lambda _row: "") -> str:
        """Return the table as escaped HTML. ``lead`` gives the HTML before the text of a row's first cell."""
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in self.header)
        body = []
        for index, (first, *others) in enumerate(self.rows):
            rest = "".join(map(_cell, self.header[1:], others))
            kind, label = ' class="total"' if first == TOTAL else "", escape(self.header[0])
            row = f'<th scope="row" data-label="{label}">{lead(index)}{escape(first)}</th>{rest}'
            body.append(f"<tr{kind}>{row}</tr>")
        kind = ' class="many"' if len(self.header) > FEW else ""
        return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def markdown(self) -> str:
        """Return the table as escaped Markdown."""
        lines = [self.header, ("---", *(["---:"] * (len(self.header) - 1)))]
        written = [lines[0], *self.rows]
        cells = [" | ".join(map(markdown, row)) for row in written]
        cells.insert(1, " | ".join(lines[1]))
        return "\n".join(f"| {row} |" for row in cells)


TOTAL = "all tensors"

FEW = 3
"""Maximum number of columns that a phone shows side by side; it shows the rows of other tables as paragraphs."""

LONG = 24
"""Maximum number of characters of a cell that stays on one line."""


def _cell(header: str, text: str) -> str:
    """Return a cell of a table's body. A phone shows the header before the text."""
    kind = ' class="wide"' if len(text) > LONG else ""
    return f'<td{kind} data-label="{escape(header)}">{escape(text)}</td>'


def markdown(text: str) -> str:
    """Return text that Markdown shows literally, on one line."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def named(text: str) -> str:
    """Return a name in a form to show: printable, not too long, and the last part of an absolute path."""
    name = printable(without_folder(text))
    return name if len(name) <= LIMIT else f"{name[: LIMIT - 1]}…"


def width_table(facts: Facts) -> Table:
    """Return the table of widths, and of schemes if not all are grids, with the number and the share of experts."""
    shown = 1 if facts.grids_alone else 2
    rows = [
        (*(str(bits), scheme)[:shown], f"{count:,}", f"{count / facts.num_experts:.1%}")
        for (bits, scheme), count in facts.kinds.items()
    ]
    return Table((*("bits", "scheme")[:shown], "experts", "share"), tuple(rows))


def size_table(facts: Facts) -> Table:
    """Return the table of the checkpoint's parts with their sizes and shares."""
    total = facts.sizes.total
    rows = [(part.title, size(part.bytes), f"{part.bytes / total:.1%}") for part in facts.sizes.parts]
    return Table(("tensors", "size", "share"), (*rows, (TOTAL, size(total), "100%")))


def layer_table(facts: Facts) -> Table:
    """Return the table of layers: widths, promotions, fallbacks, and the errors of the experts."""
    widths = tuple(facts.widths)
    header = ["layer", "average bits", *(f"{bits} bit" for bits in widths), "promoted", "fallback"]
    header += ["mean error of weights", "largest, of expert"]
    rows = []
    for layer in facts.layers:
        entries = facts.recorded.experts(layer.prefix).values()
        errors = [(it.relative_error, it.expert) for it in entries if it.relative_error is not None]
        row = [layer.label, f"{statistics.mean(layer.widths):.3f}", *(str(layer.widths.count(b)) for b in widths)]
        row += [str(len(layer.promoted)), str(len(layer.fallbacks))]
        row += [_percent(statistics.mean(error for error, _ in errors)) if errors else "–"]
        row += [f"{_percent(max(errors)[0])}, {max(errors)[1]}" if errors else "–"]
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows))


def _percent(share: float) -> str:
    return f"{number(100 * share)} %"


def text_tables(found: Evaluations) -> list[Table]:
    """Return a table of perplexities, and a table of distances if there are results with a reference."""
    if not found.texts:
        return []
    rows = [
        (named(it.data), str(it.window), f"{it.tokens:,}", _pm(it.perplexity, it.perplexity_error), _reference(it))
        for it in found.texts
    ]
    tables = [Table(("text", "window", "tokens", "perplexity", "of the reference"), tuple(rows))]
    distances = [
        (
            named(it.data),
            named(it.reference or "not named"),
            _pm(it.kl.mean, it.kl.error),
            *(number(value) for value in (it.kl.median, it.kl.p99, it.kl.max)),
            f"{100 * it.kl.same_top:.2f} ± {100 * it.kl.same_top_error:.2f} %",
        )
        for it in found.texts
        if it.kl is not None
    ]
    if distances:
        header = ("text", "reference", "KL, nats per token", "median", "99th percentile", "largest", "same top token")
        tables.append(Table(header, tuple(distances)))
    return tables


def _reference(result: TextResult) -> str:
    return "–" if result.reference_perplexity is None else number(result.reference_perplexity, 4)


def _pm(value: float, error: float) -> str:
    return f"{number(value, 4)} ± {number(error, 2)}"


def task_table(found: Evaluations) -> Table | None:
    """Return the table of task scores; None without scores."""
    if not found.tasks:
        return None
    rows = [
        (
            named(it.task),
            named(it.metric),
            f"{it.value:.4f}" + ("" if it.stderr is None else f" ± {it.stderr:.4f}"),
            f"{it.samples:,}" + ("" if it.limit is None else f" (limit {it.limit:,})"),
            it.backend,
        )
        for it in found.tasks
    ]
    return Table(("task", "metric", "value", "samples", "computed by"), tuple(rows))


def evaluation_tables(found: Evaluations) -> Sequence[Table]:
    """Return all tables for evaluation.json."""
    tasks = task_table(found)
    return [*text_tables(found), *([tasks] if tasks else [])]

"""The Markdown table of all results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.rows import OURS, Row
from benchmarks.replication.paper.common import markdown_table

HEADER = ("quantizer", "bits", "KL", "99%", "max", "perplexity", "loss", "KL / ours", "seconds", "versions")

Results = Mapping[str, Mapping[str, Any]]
"""Name of a row → its result, or ``failed`` with the reason."""


def table(rows: Sequence[Row], results: Results) -> list[str]:
    """Return the lines of the table, by width and then by KL; rows without a result are left out."""
    known = [row for row in rows if row.name in results]
    widths = sorted({row.bits for row in known})
    body = [line for bits in widths for line in _width([row for row in known if row.bits == bits], results)]
    return markdown_table(HEADER, body)


def best_of_ours(rows: Sequence[Row], results: Results) -> float | None:
    """Return the least mean KL among our rows of a width, None where there is none yet."""
    found = [results[row.name]["kl"]["mean"] for row in rows if row.peer == OURS and "kl" in results[row.name]]
    return min(found, default=None)


def _width(rows: Sequence[Row], results: Results) -> list[tuple[str, ...]]:
    """Return the cells of the rows of one width; failed ones come last."""
    base = best_of_ours(rows, results)
    measured = [row for row in rows if "kl" in results[row.name]]
    failed = [row for row in rows if row not in measured]
    measured.sort(key=lambda row: -float(results[row.name]["kl"]["mean"]))
    cells = [_cells(row, results[row.name], base) for row in measured]
    empty = [""] * (len(HEADER) - 3)
    return cells + [
        (row.label, f"{row.storage.bits:.2f}", f"not run: {results[row.name]['failed']}", *empty) for row in failed
    ]


def _cells(row: Row, result: Mapping[str, Any], base: float | None) -> tuple[str, ...]:
    kl, loss = result["kl"], result["perplexity"] - result["original"]
    ratio = "" if base is None else f"{kl['mean'] / base:.2f}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        row.label, f"{result['total_bits']:.2f}", f"{kl['mean']:.4f}", f"{kl['p99']:.3f}", f"{kl['max']:.2f}",
        f"{result['perplexity']:.3f}", f"{loss:.3f}", ratio, f"{result['seconds']:.0f}", versions,
    )  # fmt: skip

"""The Markdown table of all results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.rows import PLAN, Row
from benchmarks.replication.paper.common import markdown_table

HEADER = ("bits", "quantizer", "KL", "99%", "max", "perplexity", "loss", "KL / plan", "seconds", "versions")

Results = Mapping[str, Mapping[str, Any]]
"""Name of a row → its result, or ``failed`` with the reason."""


def table(rows: Sequence[Row], results: Results) -> list[str]:
    """Return the lines of the table, by total bits and then from the largest KL to the least, what failed first.

    Rows without a result are left out. Ratios refer to our plan with the same total bits.
    """
    known = [row for row in rows if row.name in results]
    plans = {row.storage.bits: results[row.name]["kl"]["mean"] for row in known if row.label == PLAN}
    known.sort(key=lambda row: (row.storage.bits, -_divergence(results[row.name])))
    return markdown_table(HEADER, [_cells(row, results[row.name], plans.get(row.storage.bits)) for row in known])


def _divergence(result: Mapping[str, Any]) -> float:
    return float(result["kl"]["mean"]) if "kl" in result else float("inf")


def _cells(row: Row, result: Mapping[str, Any], base: float | None) -> tuple[str, ...]:
    if "failed" in result:
        found = (f"{row.storage.bits:.2f}", row.label, f"not run: {result['failed']}".replace("|", "\\|"))
        return (*found, *("" for _ in HEADER[len(found) :]))
    kl, loss = result["kl"], result["perplexity"] - result["original"]
    ratio = "" if base is None else f"{kl['mean'] / base:.2f}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['total_bits']:.2f}", row.label, f"{kl['mean']:.4f}", f"{kl['p99']:.3f}", f"{kl['max']:.2f}",
        f"{result['perplexity']:.3f}", f"{loss:.3f}", ratio, f"{result['seconds']:.0f}", versions,
    )  # fmt: skip

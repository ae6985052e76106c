"""The figures on README's first screen are those of docs/benchmarks.md."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal

import pytest

from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
COLUMNS = {"2": (0, 2), "2.5": (1, 3)}
"""Average → the columns of both models in the table of perplexities."""

METHODS = {
    "`kl`, the default with a text (`--data`)": "kl",
    "`kl`, `--scheme trellis`": "kl, trellis",
    "one width per layer (BSP)": "bsp, bsp-cosine",
    "every expert 2 bits": "uniform",
    "GEMQ": "gemq",
    "PMQ (MC-MoE)": "pmq",
    "the paper's rule": "router-norm-maxvar, router-norm",
    "the paper's rule, HQQ: the default without a text": "router-norm-maxvar, HQQ",
}
"""README's words → the row of the table of perplexities."""


def first_table() -> list[list[str]]:
    """Return the cells of README's table of costs."""
    body = README.split("| average bits | method | Mixtral | Qwen3-MoE |\n")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in body.splitlines()[1:]]


def measured(method: str, average: str) -> tuple[str, ...]:
    """Return both models' perplexities in the table of methods."""
    words, table = BENCHMARKS.split("Perplexity (original ")[1].split("\n\n")[:2]
    if method == "bfloat16":
        return tuple(re.findall(r"\d+\.\d+", words)[:2])
    (cells,) = re.findall(rf"^\| {re.escape(METHODS[method])} \|(.*)\|$", table, re.MULTILINE)
    return tuple(cells.split("|")[column].strip() for column in COLUMNS[average])


@pytest.mark.parametrize("row", first_table(), ids=lambda row: " ".join(row[:2]))
def test_the_first_table(row: list[str]) -> None:
    average, method, *shown = row
    assert [Decimal(value) for value in shown] == [
        Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP) for value in measured(method, average)
    ]

"""The figures on README's first screen are those of docs/benchmarks.md."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal

import pytest

from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
AVERAGES = ("1.75", "2", "2.25", "2.5", "2.75")

METHODS = {
    "`kl`": "kl",
    "`kl`, widths 1,2,3": "kl, widths 1,2,3",
    "PMQ (MC-MoE), widths 1,2,3": "pmq",
    "the paper's rule, widths 1,2,3": "router-norm-maxvar",
    "every expert 2 bits": "uniform",
}
"""README's words → the row of a table of perplexities."""


def _now(average: str) -> re.Pattern[str]:
    """Return what finds both models' perplexities at an average in the table of the defaults."""
    rows = (rf"^\| {model} \| {re.escape(average)} \|.* (\S+) \|$" for model in ("Mixtral", "Qwen3-MoE"))
    return re.compile(r"[\s\S]*?".join(rows), re.MULTILINE)


OTHERWISE = {
    "bfloat16": re.compile(r"^\| original \|[ |]+ ([\d.]+) \|[ |]+ ([\d.]+) \|$", re.MULTILINE),
    "`kl`, the default with a text (`--data`); widths 1,2,3,4": _now("2.5"),
    "`kl`, the default with a text": _now("2"),
    "`kl`, `--scheme trellis`": re.compile(
        r"^\| Mixtral \| trellis \|.* (\S+) \| \S+ \|$[\s\S]*?^\| Qwen3-MoE \| trellis \|.* (\S+) \| \S+ \|$",
        re.MULTILINE,
    ),
    "the paper's rule, HQQ: the default without a text": re.compile(
        r"^\| 1,2,3 @ 2\.5 \| hqq \| \S+ \| \S+ \| (\S+) \| \S+ \| \S+ \| (\S+) \|$", re.MULTILINE
    ),
}
"""README's words → both models' perplexities in the table of calibration."""


def first_table() -> list[list[str]]:
    """Return the cells of README's table of costs."""
    body = README.split("| average bits | method | Mixtral | Qwen3-MoE |\n")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in body.splitlines()[1:]]


def compared(model: str, method: str, average: str) -> str:
    """Return a cell of the tables of methods."""
    table = BENCHMARKS.split(f"**{model}**, perplexity")[1]
    (cells,) = re.findall(rf"^\| {re.escape(method)} \|(.*)\|$", table.split("\n\n")[1], re.MULTILINE)
    return str(cells.split("|")[AVERAGES.index(average)].strip())


@pytest.mark.parametrize("row", first_table(), ids=lambda row: " ".join(row[:2]))
def test_the_first_table(row: list[str]) -> None:
    average, method, *shown = row
    if (pattern := OTHERWISE.get(method)) is not None:
        mixtral, qwen = pattern.findall(BENCHMARKS)[0]
    else:
        mixtral, qwen = (compared(model, METHODS[method], average) for model in ("Mixtral", "Qwen3-MoE"))
    assert [Decimal(value) for value in shown] == [
        Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP) for value in (mixtral, qwen)
    ]

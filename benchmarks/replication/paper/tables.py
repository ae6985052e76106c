"""This part makes the paper's tables: methods at all budgets, the two halves of its rule, and the sweep of ζ."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from benchmarks.replication.paper.common import THREE_LEVELS, Bench, Result, conditions, markdown_table, pivots
from planner.comparison.compare import Row
from planner.comparison.entries import Entry
from planner.comparison.report import cell, grouped, write_report
from planner.planning.methods import METHODS

THREE_LEVEL_BITS = ("1.75", "2", "2.25", "2.5", "2.75")
TWO_LEVEL_BITS = ("2.125", "2.25", "2.375", "2.5", "2.625", "2.75")
ABLATION = ("max-var", "router-norm", "router-norm-maxvar")
ZETAS = (1.0, 2.0, 2.5, 3.0, 4.0, 5.0)
ZETA_BITS = Fraction(2)
ONE_WIDTH = ("uniform", "slim")
"""Methods that whole averages only are given to; not more than Table 1 has."""


def table1(bench: Bench) -> Result:
    """Every method at every budget, three levels to choose from."""
    averages = bench.some(THREE_LEVEL_BITS)
    usual = [name for name in METHODS if name not in (*ONE_WIDTH, "random")]
    found = bench.compared(usual, averages)
    found += bench.compared(("random",), averages, bench.asked.seeds)
    found += bench.compared(("slim",), (Fraction(2),)) + bench.compared(("uniform",), (Fraction(2), Fraction(3)))
    rows = bench.rows(found)
    _report(bench, rows, averages)
    lines = [
        f"Choices 1, 2, 3; {conditions(bench, seeds=True)}",
        "",
        "The same as pivot tables, with what choosing costs, CSV, JSON and a plot: folder `table1`.",
        "",
        *markdown_table(
            ["method", "bits", "achieved", "MiB", "perplexity", "KL, nats per token", "same top token", "s to choose"],
            _table1_lines(rows),
        ),
    ]
    return Result("Table 1: methods compared", lines, rows)


def _report(bench: Bench, rows: Sequence[Row], averages: tuple[Fraction, ...]) -> None:
    """Write what ``moeq compare`` writes; an earlier run of the part may have left it."""
    folder = bench.output / "table1"
    shutil.rmtree(folder, ignore_errors=True)
    run = bench.run()
    wanted = replace(run.wanted, methods=tuple(METHODS), averages=averages, seeds=bench.asked.seeds)
    write_report(folder, rows, wanted, str(bench.folder), run.progress)


def _table1_lines(rows: Sequence[Row]) -> list[list[str]]:
    original = rows[0]
    size, value = (
        f"{original['bytes'] / 2**20:.2f}",
        f"{original['perplexity']:.3f} ± {original['perplexity_error']:.3f}",
    )
    lines = [["original", "16", "16", size, value, "0", "1", ""]]
    for (method, _), by_average in grouped(rows).items():
        for average in sorted(by_average, reverse=True):
            same = by_average[average]
            perplexity, error = cell(same, "perplexity")
            kl, kl_error = cell(same, "kl")
            seconds = same[0]["cost"].get("seconds")
            lines.append(
                [
                    method,
                    f"{average:g}",
                    f"{same[0]['achieved']:.4g}",
                    f"{same[0]['bytes'] / 2**20:.2f}",
                    f"{perplexity:.3f} ± {error:.3f}",
                    f"{kl:.4f} ± {kl_error:.4f}",
                    f"{cell(same, 'same_top')[0]:.3f}",
                    "" if seconds is None else f"{seconds:.2f}",
                ]
            )
    return lines


def table2(bench: Bench) -> Result:
    """Router norm and MaxVar, each alone and together."""
    lines, rows = [conditions(bench), ""], []
    for name, choices, averages in (
        ("Two-level", (2, 3), bench.some(TWO_LEVEL_BITS)),
        ("Three-level", THREE_LEVELS, bench.some(THREE_LEVEL_BITS)),
    ):
        found = [bench.entry(method, average, choices, method) for method in ABLATION for average in averages]
        scored = bench.rows(found)
        lines += [f"### {name}, choices {', '.join(map(str, choices))}", "", *pivots(scored)]
        lines += [_promoted(found), ""]
        rows += [{"choices": ",".join(map(str, choices)), **row} for row in scored]
    return Result("Table 2: the two halves of the rule", lines, rows)


def _promoted(found: Sequence[Entry]) -> str:
    """Say how many experts MaxVar moved up; it does not depend on the average."""
    plan = next(entry.plan for entry in found if entry.method == "router-norm-maxvar" and entry.plan)
    moved, experts = sum(map(len, plan.promoted.values())), sum(map(len, plan.experts.values()))
    return f"MaxVar (ζ = 3) moved {moved} of {experts} experts up."


def table5(bench: Bench) -> Result:
    """ζ from a pure MaxVar order to hardly any promotion."""
    found = [bench.entry(f"zeta {zeta:g}", ZETA_BITS, THREE_LEVELS, "router-norm-maxvar", zeta=zeta) for zeta in ZETAS]
    original, *scored = bench.rows(found)
    rows, body = [], []
    for zeta, entry, row in zip(ZETAS, found, scored, strict=True):
        plan = entry.plan
        assert plan is not None
        moved = sum(map(len, plan.promoted.values()))
        rows.append({"zeta": zeta, "promoted": moved, **row})
        perplexity = f"{row['perplexity']:.3f} ± {row['perplexity_error']:.3f}"
        body.append([f"{zeta:g}", moved, perplexity, f"{row['kl']:.4f} ± {row['kl_error']:.4f}"])
    experts = sum(layer.num_experts for layer in bench.layout.layers)
    lines = [
        f"{float(ZETA_BITS):g} bits, choices 1, 2, 3; {conditions(bench)} Perplexity of the original: "
        f"{original['perplexity']:.3f}. ζ = 1 is the order by MaxVar alone.",
        "",
        *markdown_table(["ζ", f"moved up, of {experts} experts", "perplexity", "KL, nats per token"], body),
    ]
    return Result("Table 5: sweep of ζ", lines, rows)

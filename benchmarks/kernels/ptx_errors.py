"""This script runs the fused kernels' PTX in the tests' emulator and prints a table of errors against float64.

python -m benchmarks.kernels.ptx_errors [--arch sm_80 …] [--all]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.kernels.ptx.cases import Case, Figures
from tests.kernels.ptx.emulator.device import SHARED_KIB
from tests.kernels.ptx.process import compiling
from tests.kernels.ptx.table import EVERY_RUN, TRELLISES, cases
from vllm_moeq.kernels.triton.schedule import FEW_TOKENS

HEADER = """\
| arch | kernel | tile | dtype | widths | tokens | routing | error | rounding | difference | found |
|---|---|---|---|---|---:|---|---:|---:|---:|---|"""


def wanted(architectures: list[str], every: bool) -> Iterator[Case]:
    """Yield the cases of the table."""
    if every:
        yield from cases(architectures)
        return
    for arch in architectures:
        for case in (*EVERY_RUN, *TRELLISES):
            yield replace(case, arch=arch)


def row(case: Case, figures: Figures) -> str:
    """Return a line of the table."""
    kernel = "few_tokens" if case.tokens <= FEW_TOKENS else "many_tokens"
    tile = f"{case.schedule.rows}×{case.schedule.tokens}" if case.schedule else ""
    numbers = " | ".join(f"{value:.1e}" for value in (figures.error, figures.rounding, figures.step))
    found = "; ".join(figures.problems) or "nothing"
    shown = f"{case.arch} | {kernel} | {tile} | {case.dtype} | {case.widths} | {case.tokens} | {case.routing}"
    return f"| {shown} | {numbers} | {found} |"


def main() -> int:
    """Print the table; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(SHARED_KIB), choices=list(SHARED_KIB))
    parser.add_argument("--all", action="store_true", help="every width and schedule, routings and splits: hours")
    args = parser.parse_args()
    print(HEADER)
    bad = 0
    with tempfile.TemporaryDirectory() as folder, compiling(Path(folder)) as emulated:
        for case in wanted(args.arch, args.all):
            figures = emulated("cases.run", case)
            bad += bool(figures.problems)
            print(row(case, figures), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

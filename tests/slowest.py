"""Print the slowest files of test runs as a table: ``python -m tests.slowest build/test.xml``, or several reports."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROWS = 15


def seconds(reports: list[Path]) -> dict[str, float]:
    """Return file → seconds of its tests and their fixtures, from reports in JUnit's format."""
    found: dict[str, float] = defaultdict(float)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            parts = [part for part in (case.get("classname") or "").split(".") if not part.startswith("Test")]
            found["/".join(parts) + ".py"] += float(case.get("time") or 0)
    return found


def table(found: dict[str, float]) -> str:
    """Return Markdown: the slowest files, then the sum of all."""
    slowest = sorted(found.items(), key=lambda item: -item[1])[:ROWS]
    rows = [f"| `{name}` | {value:.0f} |" for name, value in slowest]
    return "\n".join(["| file | seconds |", "|---|---:|", *rows, f"| all {len(found)} | {sum(found.values()):.0f} |"])


if __name__ == "__main__":
    print(table(seconds([Path(argument) for argument in sys.argv[1:]])))

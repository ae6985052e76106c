"""The table of families: its columns and counts."""

from __future__ import annotations

import pytest

from benchmarks.coverage import Outcome, table
from benchmarks.greedy import AS_DENSE

ROWS = [
    Outcome("one", "yes", "yes", "yes", "yes"),
    Outcome("two", "yes", "yes", "yes", AS_DENSE),
    Outcome("three", "yes", "yes", "yes", "ValueError: no such kernel"),
    Outcome("four", "two sizes", "two sizes", "two sizes", "no"),
]


def test_the_last_column_counts_what_vllm_served() -> None:
    lines = table(ROWS).splitlines()
    assert lines[0].endswith("| experts computed by our kernels | served: same tokens |")
    assert lines[1] == "|---|---|---|---|---|"
    assert lines[3] == f"| `two` | yes | yes | yes | {AS_DENSE} |"
    assert lines[4] == "| `three` | yes | yes | yes | no: ValueError: no such kernel |"
    assert lines[5] == "| `four` | no: two sizes | no | no | no |"
    assert lines[6] == "| all | 3 of 4 | 3 of 4 | 3 of 4 | 2 of 4 |"


@pytest.mark.parametrize("rows", [[], [Outcome("one", "yes", "yes", "yes")]], ids=["none", "one"])
def test_without_serving_there_is_no_such_column(rows: list[Outcome]) -> None:
    assert "served: same tokens" not in table(rows)

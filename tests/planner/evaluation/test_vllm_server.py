"""What is said of a server that did not start."""

from __future__ import annotations

from planner.evaluation.vllm_server import LAST_LINES, WRONG_FLAG, end_of

LOG = "\n".join(f"line {number}" for number in range(100))


def test_a_wrong_flag_is_named_without_the_others() -> None:
    usage = "usage: api_server.py [-h]\n" + "    [--a A]\n" * 100 + "api_server.py: error: unrecognized arguments: --b"
    assert end_of(usage, WRONG_FLAG) == "api_server.py: error: unrecognized arguments: --b"


def test_the_last_lines_are_shown_of_other_ends() -> None:
    for status in (None, 1, -9):
        assert end_of(LOG, status).splitlines() == [f"line {number}" for number in range(100 - LAST_LINES, 100)]
    assert end_of("", 1) == ""

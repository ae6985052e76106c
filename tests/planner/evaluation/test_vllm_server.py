"""The port of a server, and what is said of one that did not start."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from planner.evaluation import vllm_server
from planner.evaluation.vllm_server import LAST_LINES, WRONG_FLAG, ServerError, end_of, free_port

LOG = "\n".join(f"line {number}" for number in range(100))


def test_a_wrong_flag_is_named_without_the_others() -> None:
    usage = "usage: api_server.py [-h]\n" + "    [--a A]\n" * 100 + "api_server.py: error: unrecognized arguments: --b"
    assert end_of(usage, WRONG_FLAG) == "api_server.py: error: unrecognized arguments: --b"


def test_the_last_lines_are_shown_of_other_ends() -> None:
    for status in (None, 1, -9):
        assert end_of(LOG, status).splitlines() == [f"line {number}" for number in range(100 - LAST_LINES, 100)]
    assert end_of("", 1) == ""


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
            each.listen()
        used = [each.getsockname()[1] for each in sockets]
        free = free_port()
        assert 1024 <= free < 32768  # Linux gives 32768 and above to connections
        monkeypatch.setattr(vllm_server, "PORTS", [*used, free])
        monkeypatch.setattr(vllm_server, "TRIES", 3)
        assert free_port() == free
        monkeypatch.setattr(vllm_server, "PORTS", used)
        monkeypatch.setattr(vllm_server, "TRIES", 2)
        with pytest.raises(ServerError, match="found 2 in use"):
            free_port()

"""``moeq bench`` refuses what cannot be measured before any server starts, and shows what it measured."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from planner.commands.bench import print_speeds
from planner.evaluation.serving_speed import METRICS, Load, better_by, check_lengths, find_endpoint
from planner.evaluation.vllm_server import free_port
from tests.conftest import Outcome, one_line
from tests.paths import MIXTRAL
from vllm_moeq.format import UsageError

Moeq = Callable[..., Outcome]


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """Run a web server that gives one answer to everything, and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-- --enforce-eager", "DIR: expected one or two models before vLLM's flags, found none"),
        ("a b c", "DIR: expected one or two models before vLLM's flags, found a b c"),
        ("{model} {model}", "DIR2: expected another model than DIR"),
        ("{model} none/such/folder", "none/such/folder: expected a model folder or a Hub name"),
        ("{model} -- --port 8000", "--port: moeq bench starts its own server and asks it; expected it left out"),
        ("{model} -- --served_model_name=x", "--served-model-name: moeq bench starts its own"),
        ("{model} -- --model x", "--model: moeq bench starts its own server"),
        ("{model} -- --quantization=moeq", "--quantization: {model} is no checkpoint of moeq; expected it left out"),
        ("{model} --input-tokens 5000", "expected at most 512 together, the longest text of {model}, found 5064"),
        ("{model} -- --max-model-len 100", "expected at most 100 together, the longest text of {model}, found 192"),
        ("{model} --url localhost:8000", "--url: expected an address such as http://localhost:8000, found"),
        ("{model} --url http://127.0.0.1:{free}", "--url: expected a running server, found none at http://127.0.0.1:"),
        ("{model} --url http://x -- --seed 1", "--url: expected no flags for vLLM, whose server runs already, found"),
        ("{model} b --url http://x", "--url: expected one model, whose server it is, found 2"),
        ("{ours} -- --enable-eplb", "--enable-eplb: experts of different widths cannot change places"),
        ("{ours}", "expected a tokenizer, such as tokenizer.json, found none"),
        (
            "{model} --max-model-len 100",
            "moeq bench: no such option: --max-model-len; vLLM's flags stand behind -- (see moeq bench --help)",
        ),
        ("{model} --request 3 -- --seed 1", "no such option: --request (Possible options: --requests) (see moeq bench"),
    ],
)
def test_what_cannot_be_measured(moeq: Moeq, quantized_mixtral: Path, words: str, message: str) -> None:
    names = {"model": str(MIXTRAL), "ours": str(quantized_mixtral), "free": free_port()}
    refusal = one_line(moeq("bench", *(word.format(**names) for word in words.split())))
    assert message.format(**names) in refusal


def test_without_vllm(moeq: Moeq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    refusal = one_line(moeq("bench", MIXTRAL))
    assert "vLLM" in refusal
    assert "pip install" in refusal


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, "", "expected an OpenAI server, found status 404 from http"),
        (401, "", "found status 401 from http.*; OPENAI_API_KEY holds its key"),
        (200, "<html>", "expected an OpenAI server, found none at http"),
        (200, "[]", "expected an OpenAI server, found none"),
        (200, "[" * 100_000, "expected an OpenAI server, found none"),
        (200, '{"data": []}', "expected an OpenAI server, found none"),
    ],
)
def test_another_server(status: int, body: str, message: str) -> None:
    with answering(status, body) as url, pytest.raises(UsageError, match=message):
        find_endpoint(url)


@pytest.mark.parametrize("url", ["http://[", "http://host:port", "http://a b", f"http://{'a' * 80}.b"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="--url: expected "):
        find_endpoint(url)


@pytest.mark.parametrize("reply", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_a_program_that_does_not_speak_http(reply: bytes) -> None:
    def talk(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=talk, args=(listening,))
        thread.start()
        with pytest.raises(UsageError, match=r"--url: expected .* server, found none at http://127"):
            find_endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


def test_an_address_with_and_without_version() -> None:
    with answering(200, '{"data": [{"id": "mine", "max_model_len": 512}]}') as url:
        found = [find_endpoint(address) for address in (url, f"{url}/", f"{url}/v1", f"{url}/v1/")]
    assert {(it.url, it.model, it.longest) for it in found} == {(url, "mine", 512)}


def test_lengths_that_just_fit() -> None:
    check_lengths(Load(), 192, "x")
    with pytest.raises(UsageError, match="expected at most 191 together"):
        check_lengths(Load(), 191, "x")


def test_the_table_compares_two(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    first = dict.fromkeys(METRICS, 20.0)
    second = dict.fromkeys(METRICS, 10.0)
    better = better_by(first, second)
    assert better == {name: 2.0 if metric.more else 0.5 for name, metric in METRICS.items()}
    print_speeds({"[red]mine": first, "other": second}, better)
    lines = capsys.readouterr().out.splitlines()
    assert any("[red]mine" in line and "20.00" in line for line in lines)
    assert any("times as good as the second" in line and "2.00×" in line and "0.50×" in line for line in lines)

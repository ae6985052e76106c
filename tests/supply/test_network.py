"""Nothing is fetched while the packages are imported or a local checkpoint is read, loaded and served."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner.evaluation.vllm_server import Server, cpu_environment
from tests.paths import MIXTRAL, MOEQ, ROOT

pytestmark = pytest.mark.slow

GUARD = '''
"""Python imports this module when it starts: look-ups of names and connections beyond this machine are noted."""

import os
import socket


def _note(address):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{address}\\n")
    raise OSError(f"no network in this test: {address}")


def _is_local(host):
    return host in (None, "", "localhost", socket.gethostname()) or str(host).startswith(("127.", "::1", "0.0.0.0"))


_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _checked(original):
    def connect(self, address):
        # vLLM asks a datagram socket which interface it would take; that sends nothing.
        if self.family != socket.AF_UNIX and self.type & 0xF == socket.SOCK_STREAM and not _is_local(address[0]):
            _note(address)
        return original(self, address)

    return connect


def _lookup(host, *rest, **more):
    if not _is_local(host.decode() if isinstance(host, bytes) else host) and not str(host)[:1].isdigit():
        _note(host)
    return _getaddrinfo(host, *rest, **more)


socket.socket.connect, socket.socket.connect_ex = _checked(_connect), _checked(_connect_ex)
socket.getaddrinfo = _lookup
'''


@pytest.fixture
def guarded(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Variables for a process without network, and where it notes attempts."""
    folder, log = tmp_path / "guard", tmp_path / "attempts"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(GUARD)
    log.touch()
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {"PYTHONPATH": path, "NETWORK_LOG": str(log)}, log


def test_the_guard_guards(guarded: tuple[dict[str, str], Path]) -> None:
    variables, log = guarded
    code = "import urllib.request as it; it.urlopen('http://example.invalid')"
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True)
    assert result.returncode != 0
    assert log.read_text() == "example.invalid\n"


def test_importing_verifying_and_loading(guarded: tuple[dict[str, str], Path], quantized_mixtral: Path) -> None:
    variables, log = guarded
    code = (
        "import sys\n"
        "import vllm_moeq, vllm_moeq.format, vllm_moeq.kernels, vllm_moeq.hf, planner.cli\n"
        "vllm_moeq.register()\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "sys.argv = ['moeq', 'verify', sys.argv[1]]\n"
        "planner.cli.main()\n"
    )
    environment = {**os.environ, **variables}
    subprocess.run([sys.executable, "-c", code, quantized_mixtral], env=environment, check=True, capture_output=True)
    assert log.read_text() == ""


@pytest.mark.server
@pytest.mark.full
def test_serving(guarded: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    from openai import OpenAI

    variables, log = guarded
    folder = tmp_path / "quantized"
    subprocess.run([MOEQ, "quantize", MIXTRAL, "-o", folder, "--quantizer", "rtn"], check=True)
    flags = ["--max-model-len", "128", "--max-num-seqs", "2", "--dtype", "bfloat16", "--enforce-eager"]
    with Server(folder, tmp_path / "log", flags, {**cpu_environment(), **variables}) as server:
        client = OpenAI(base_url=server.url, api_key="none")
        reply = client.completions.create(model="model", prompt="def ", max_tokens=4, temperature=0)
    assert reply.choices[0].text
    assert log.read_text() == ""

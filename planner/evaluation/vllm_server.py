"""Run a vLLM server as a child process: start it, wait until it is healthy, stop it."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from vllm_moeq.format import MoeqError

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1

PORTS = range(16384, 32768)
"""Ports that servers may take: neither well known, nor those that Linux gives to connections, 32768 and above."""

TRIES = 100

LAST_LINES = 25
WRONG_FLAG = 2
"""The exit status of Python's parser of flags, which prints every flag that there is, and then what is wrong."""

NAME = "model"
"""The name of the served model."""


def _end_with_parent() -> None:
    """Make Linux end the server when this process is killed, so that the server frees its memory."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class ServerError(MoeqError):
    """The server did not start or answer. After a failed start, the message ends with the last lines of the log."""


def free_port() -> int:
    """Return a free TCP port of the loopback interface.

    A server binds its port many seconds after it was chosen. A port that the system itself would name may by then
    belong to any connection, one of the server's own among them; so the port lies below those that systems name.

    Raises:
        ServerError: none was found.
    """
    for port in random.SystemRandom().sample(PORTS, TRIES):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"expected a free TCP port of 127.0.0.1, found {TRIES} in use")


class Server:
    """``python -m vllm.entrypoints.openai.api_server`` for one folder, on a free port of this machine.

    Args:
        folder: any Hugging Face folder that vLLM serves.
        log: file that receives the server's output.
        flags: further vLLM flags.
        environment: variables added to this process's own.
        timeout: seconds to wait until the server is healthy.

    Raises:
        ServerError: the server exited or was not healthy in time.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        flags: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        timeout: float = 600,
    ) -> None:
        self.folder = folder
        self.log = log
        self.flags = list(flags)
        self.environment = environment or {}
        self.timeout = timeout
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL for OpenAI clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def process(self) -> int:
        """ID of the server's process, the leader of its own session."""
        if self._process is None:
            raise ServerError("expected a server that has been started")
        return self._process.pid

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(self.port), *self.flags]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                status = self._process.returncode
                raise ServerError(f"the server exited with status {status}:\n{end_of(self._log(), status)}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServerError(f"the server was not healthy after {self.timeout:.0f} s:\n{end_of(self._log())}")

    def _log(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Ask the server and its workers to end; kill them after 20 s."""
        process = self._process
        if process is None:
            return
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def end_of(log: str, status: int | None = None) -> str:
    """Return the part of a server's log that says why it ended: of a wrong flag the last line, without all the others.

    Args:
        log: the whole log.
        status: the server's exit status, if it has ended.
    """
    return "\n".join(log.splitlines()[-1 if status == WRONG_FLAG else -LAST_LINES :])


def quiet_environment() -> dict[str, str]:
    """Return settings that keep vLLM from telling anybody that it runs, and tokenizers from warning of its forks."""
    return {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def cpu_environment() -> dict[str, str]:
    """Return settings that make vLLM's CPU backend start on a small machine without a network."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **quiet_environment()}

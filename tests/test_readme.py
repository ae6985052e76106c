"""A newcomer's path: the blocks of README.md that are marked as shell, as they stand, on the shipped model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.docs.documents import shell_blocks
from tests.paths import ROOT

SECONDS = 800
OF_A_TEST = ("LD_PRELOAD", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")
"""Variables that tests and their machines set, and a newcomer has not."""


def environment() -> dict[str, str]:
    """Return what `. .venv/bin/activate` leaves behind."""
    found = {name: value for name, value in os.environ.items() if name not in OF_A_TEST}
    path = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"
    return {**found, "PATH": path, "VIRTUAL_ENV": sys.prefix}


def paste(block: str, folder: Path) -> str:
    """Run a block in a shell that stops at the first mistake; return what it prints.

    What is left of it is killed: a server that the block did not come to stop.
    """
    process = subprocess.Popen(
        ["bash", "-e", "-c", f"{block}\nwait"],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=SECONDS)
        log = folder / "server.log"
        assert process.returncode == 0, f"{block}\n{err}\n{log.read_text()[-4000:] if log.exists() else ''}"
        return out
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.server
def test_first_steps(tmp_path: Path) -> None:
    for name in ("benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    make, serve = shell_blocks("README.md")
    made = paste(make, tmp_path)
    assert "KL divergence" in made
    assert "<svg" in (tmp_path / "stdlib-2.5bit" / "report.html").read_text()
    answer = paste(serve, tmp_path)
    assert len(answer.strip()) > 20
    assert "Shutting down" in (tmp_path / "server.log").read_text()

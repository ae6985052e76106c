"""A newcomer's path: the fenced commands of README.md, in their order, on the shipped model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from planner.evaluation.vllm_server import cpu_environment
from tests.paths import ROOT

HEALTH = "http://localhost:8000/health"
SECONDS = 600


def commands() -> list[str]:
    """Return the commands of the blocks that are marked as shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@contextmanager
def served(command: str, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """Run a server until the block ends; it has answered by then."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.split(), cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(HEALTH, timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.server
def test_first_steps(tmp_path: Path) -> None:
    for name in ("benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **cpu_environment(), "PATH": path}
    found = commands()
    assert [line.split()[0] for line in found] == ["moeq"] * 6 + ["python"]
    outputs = {}
    *steps, serve, ask = found
    assert serve.startswith("moeq serve ")
    for step in steps:
        done = subprocess.run(step, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stderr}"
        outputs[step.split()[1]] = done.stdout
    assert "8 " in outputs["inspect"]
    assert "valid; 4 MoE layers, 32 experts" in outputs["verify"]
    assert "KL divergence" in outputs["eval"]
    assert "<svg" in (tmp_path / "stdlib-2.5bit" / "report.html").read_text()
    with served(serve, environment, tmp_path):
        done = subprocess.run(ask, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20

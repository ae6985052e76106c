"""A virtual environment of its own for each peer: their requirements exclude each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.processes.job import Job
from planner.output.files import write_json
from vllm_moeq.format import read_json

ROOT = Path(__file__).resolve().parents[2]
LONGEST_REASON = 300
"""Characters of the line that says why a process failed."""


class FailedError(Exception):
    """A peer could not be installed, or could not quantize; the message says why in one line."""


@dataclass(frozen=True)
class Environments:
    """The environments of all peers, in one folder.

    Attributes:
        folder: their folder.
        pip_flags: flags for ``pip install``, such as an index with CPU builds of torch.
    """

    folder: Path
    pip_flags: Sequence[str] = ()

    def python(self, name: str, requirements: Sequence[str]) -> Path:
        """Return the interpreter of an environment, and make the environment if it is not there yet.

        Raises:
            FailedError: pip cannot install the requirements.
        """
        folder, log = self.folder / name, self.folder / f"{name}.log"
        python, done = folder / "bin" / "python", folder / "requirements.json"
        if done.is_file() and read_json(done) == list(requirements):
            return python
        shutil.rmtree(folder, ignore_errors=True)
        _call([sys.executable, "-m", "venv", str(folder)], log)
        install = [str(python), "-m", "pip", "install", "--no-input", *self.pip_flags, *requirements]
        _call(install, log)
        write_json(done, list(requirements))
        return python


def quantize(python: Path, module: str, job: Job, path: Path, log: Path) -> None:
    """Have a peer's process do a job.

    Args:
        python: the interpreter of the peer's environment.
        module: the process, among ``benchmarks/peers/processes``.
        job: the job.
        path: file for the job.
        log: file for what the process prints.

    Raises:
        FailedError: the process failed.
    """
    job.write(path)
    _call([str(python), "-m", f"benchmarks.peers.processes.{module}", str(path)], log, path.parent)


def reason(printed: str) -> str:
    """Return the line that says why a process failed: the last one with an error's name in it, else the last one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or ["it printed nothing"]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(error|exception)\b", line, re.IGNORECASE)]
    return (named or lines)[-1][:LONGEST_REASON]


def _call(command: Sequence[str], log: Path, folder: Path | None = None) -> None:
    """Run a command whose output goes to a file; GPTQModel leaves files of its own in the current folder.

    Raises:
        FailedError: its exit status is not 0.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=variables, check=False
        ).returncode
    if status:
        raise FailedError(reason(log.read_text(encoding="utf-8", errors="replace")))

"""What only a GPU can show is measured by a script of the clone; here it is found, and started where it can work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import planner
from vllm_moeq.format import UsageError
from vllm_moeq.kernels import TABLE

FLAG = "--gpu-report"
SCRIPT = Path("benchmarks/gpu_suite.sh")
SECONDS = 2700
"""Seconds of everything, five times what the suite needs at least: a first run compiles every kernel."""


def find_script(*places: Path) -> Path:
    """Return the script of the first place that has it.

    Raises:
        UsageError: there is none: this is no clone of the repository.
    """
    for place in places or (Path.cwd(), Path(planner.__file__).parents[1]):
        if (place / SCRIPT).is_file():
            return (place / SCRIPT).resolve()
    raise UsageError(f"{FLAG}: expected a clone of the repository, found no {SCRIPT} here or beside the package")


def check_card() -> None:
    """Require a GPU and what our kernel needs on it.

    Raises:
        UsageError: one of them is missing.
    """
    if not torch.cuda.is_available():
        raise UsageError(f"{FLAG}: expected a GPU that torch {torch.__version__} can use, found none (see moeq env)")
    kernel = next(row for row in TABLE if row.automatic and "cuda" in row.automatic)
    problem = kernel.problem(torch.device("cuda"))
    if problem:
        raise UsageError(f"{FLAG}: {problem}")


def check_output(folder: Path) -> None:
    """Require a folder that is new or empty, and an archive that is new.

    Raises:
        UsageError: something is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{FLAG}: expected a new or an empty folder, found {folder}")
    archive = archive_of(folder)
    if archive.exists():
        raise UsageError(f"{FLAG}: expected a folder without an archive beside it, found {archive}")


def archive_of(folder: Path) -> Path:
    """Return where the suite writes the archive of a folder of results."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.tar.gz")


def run_suite(script: Path, folder: Path) -> int:
    """Run the suite to its end, also to that which an interruption brings about, and return its exit status.

    Args:
        script: the script.
        folder: the folder that gets its results.
    """
    variables = {"SUITE_SECONDS": str(SECONDS), "PYTHON": sys.executable} | dict(os.environ)
    process = subprocess.Popen(["bash", str(script), str(folder.resolve())], env=variables)
    interrupted = False
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            if not interrupted:
                process.terminate()  # Ctrl-C has reached it already, SIGTERM has not; it heeds the first one
            interrupted = True
    return status

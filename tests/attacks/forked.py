"""Run ``moeq verify`` on folders, each in a process of its own that is forked where torch is already imported.

It reads a folder per line, and prints a JSON object per line: exit status, seconds, the resident MiB that it took
besides its imports, and those of the imports. Libraries in the page cache count to these, so that they differ between
machines.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

from planner.common.memory import peak_bytes, reset_peak, resident_bytes

IMPORTED = ("planner.cli", "planner.commands.verify", "rich.progress", "safetensors.torch", "vllm_moeq.kernels")
"""What every run of the command imports, some of it when it is needed."""


def verify(folder: str, errors: Path) -> int:
    """Run the command and return how far the memory of this process grew, in bytes; end with its exit status."""
    from planner.cli import main

    with errors.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["moeq", "verify", folder]
    reset_peak()
    before, status = resident_bytes(), 1
    try:
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    grown = peak_bytes() - before
    with errors.open("a") as file:
        file.write(f"\n{grown}")
    return status


def measure(folder: str, errors: Path) -> dict[str, float | int | str]:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(verify(folder, errors))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said, _, grown = errors.read_text().rpartition("\n")
    seconds, imports = time.monotonic() - began, peak_bytes() >> 20
    return {"code": status, "seconds": seconds, "mib": int(grown) >> 20, "imports_mib": imports, "said": said.strip()}


if __name__ == "__main__":
    # A child shares these pages, and what it adds to them is what a process alone would add to its own.
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(measure(line.rstrip("\n"), Path(sys.argv[1]))), flush=True)

"""This module gives vLLM's CPU backend all cores and the OpenMP library that vLLM advises."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def preloaded() -> str:
    """Return LD_PRELOAD with Intel's OpenMP in it, if it is installed in this environment."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    before = os.environ.get("LD_PRELOAD", "")
    if not library.exists() or library.name in before:
        return before
    return ":".join(part for part in (str(library), before) if part)


def restart_with_openmp() -> None:
    """Start this program again with :func:`preloaded`, unless it was."""
    wanted = preloaded()
    if wanted != os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = wanted
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def all_cores() -> dict[str, str]:
    """Return a server's variables; left to itself, vLLM keeps a core for its front end."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"LD_PRELOAD": preloaded(), "VLLM_CPU_OMP_THREADS_BIND": cores}

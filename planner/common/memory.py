"""The memory of this process: measure it, return freed blocks, explain when it runs out."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_moeq.format import MoeqError

MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's malloc.h."""

LARGE_BLOCK = 4 << 20

NODES = "/sys/devices/system/node"
"""Where Linux describes NUMA nodes."""

RECLAIMED = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
"""What a node can still give, by the names in its meminfo."""


def out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: Python, the system, a GPU and a CPU each report it in their own way."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    known = known or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return known or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))


@contextmanager
def explained_if_out_of_memory(explanation: str) -> Iterator[None]:
    """Turn an out-of-memory error into an error of one line.

    Args:
        explanation: place or purpose that lacked memory, and what takes less.

    Raises:
        MoeqError: there was not enough memory.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise MoeqError(f"not enough memory {explanation}") from None


def return_large_blocks() -> None:
    """Return freed blocks of 4 MiB and more to the system at once.

    glibc raises its threshold to the largest block freed so far (up to 32 MiB) and keeps smaller ones on a heap that
    fragments. Quantizing a layer of 168 MiB grew to 590 MiB that way, and takes 290 MiB without.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def return_freed_heap() -> None:
    """Return what is free within the heap to the system, before a step whose own blocks are larger.

    What reads a model leaves a hundred MiB of freed blocks below 4 MiB; the logits that come next don't fit in them.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def available_bytes(device: torch.device) -> int:
    """Return the memory that this process can still take on a device, within its container's limit if it has one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if meminfo.is_file():
        found = int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) << 10
    limit = container.read_text().strip() if container.is_file() else "max"
    return min(found, int(limit)) if limit.isdigit() else found


def node_available_bytes() -> int | None:
    """Return the memory that the least of this process's NUMA nodes has left, or None where there are no nodes.

    vLLM binds a CPU worker's memory to the node of its cores, which may have less than the machine. As vLLM does, it
    counts free pages and those that the system gives back: cached files and reclaimable slabs.
    """
    found = []
    for node in Path(NODES).glob("node[0-9]*"):
        cpus, meminfo = node / "cpulist", node / "meminfo"
        if meminfo.is_file() and os.sched_getaffinity(0) & cpu_numbers(cpus.read_text()):
            lines = (line.split() for line in meminfo.read_text().splitlines())  # Node 0 MemFree: 7425564 kB
            found.append(sum(int(words[3]) << 10 for words in lines if words[2].rstrip(":") in RECLAIMED))
    return min(found, default=None)


def cpu_numbers(text: str) -> set[int]:
    """Return the numbers in the kernel's notation of CPUs, such as ``0-3,8``."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest << 10


def resident_bytes() -> int:
    """Return the resident memory of this process now, or its peak if the system does not report it."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()


def reset_peak() -> None:
    """Make :func:`peak_bytes` start again from the current resident memory, if the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system: the peak stays that of the whole process
        return

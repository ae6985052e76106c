"""Errors that mean that memory ran out, and those that do not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from planner.common import memory
from planner.common.memory import cpu_numbers, node_available_bytes, out_of_memory, resident_bytes, return_freed_heap


def test_a_tensor_that_no_machine_can_hold() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), OSError(errno.ENOMEM, "mmap")])
def test_memory_ran_out(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), OSError(errno.EIO, "read"), ValueError()])
def test_something_else(error: Exception) -> None:
    assert not out_of_memory(error)


@pytest.mark.parametrize(
    ("text", "numbers"), [("", set()), ("0\n", {0}), ("0-3,8\n", {0, 1, 2, 3, 8}), ("2,4-5", {2, 4, 5})]
)
def test_cpu_numbers(text: str, numbers: set[int]) -> None:
    assert cpu_numbers(text) == numbers


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system doesn't report resident memory")
def test_the_freed_heap_is_returned() -> None:
    """What is freed below a block that is still in use stays this process's until it is returned."""
    blocks = [torch.ones(1 << 14) for _ in range(1024)]  # of 64 KiB, on the heap
    last = blocks.pop()
    before = resident_bytes()
    blocks.clear()
    return_freed_heap()
    assert before - resident_bytes() > 48 << 20
    assert last.sum() == 1 << 14


def node(folder: Path, number: int, cpus: str, free: int) -> None:
    """Describe a NUMA node as Linux does: its CPUs and its memory in KiB."""
    place = folder / f"node{number}"
    place.mkdir()
    (place / "cpulist").write_text(f"{cpus}\n")
    lines = [("MemTotal", 1 << 30), ("MemFree", free), ("Active(file)", 3), ("Inactive(file)", 2), ("SReclaimable", 1)]
    (place / "meminfo").write_text("".join(f"Node {number} {name}: {size} kB\n" for name, size in lines))


def test_the_least_of_the_nodes_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "NODES", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5})
    assert node_available_bytes() is None
    node(tmp_path, 0, "0-3", free=400)
    node(tmp_path, 1, "4-7", free=300)
    node(tmp_path, 2, "8-11", free=200)
    node(tmp_path, 3, "", free=100)  # memory without CPUs
    assert node_available_bytes() == 306 << 10

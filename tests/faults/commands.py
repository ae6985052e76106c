"""Commands that write for a while, and what can go wrong meanwhile: each fault comes at the same write every time."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import torch
import transformers.models.mixtral.modeling_mixtral
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import planner.output.files
import vllm_moeq.format.shards
from planner.cli import main
from tests.paths import MIXTRAL

IMPORTED = (accelerate, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, transformers.models)
"""What the commands import late: once here, and not again in every child."""
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Command:
    """A command in a folder of its own, which holds ``model``, ``quantized`` and ``text.txt``.

    Attributes:
        arguments: of ``moeq``.
        result: what it writes.
        reads: the file that is replaced while it runs.
        writes: atomic writes before the fault: some work is done by then, and some is left.
    """

    arguments: tuple[str, ...]
    result: str
    reads: str
    writes: int


TEXT = ("--data", "text.txt")
COMMANDS = {
    "quantize": Command(("quantize", "model", "-o", "out", "--quantizer", "rtn"), "out", "model/model.safetensors", 5),
    "export": Command(("export", "quantized", "-o", "out"), "out", "quantized/model-00003-of-00005.safetensors", 4),
    "calibrate": Command(
        ("calibrate", "model", *TEXT, "--samples", "2", "--seq-len", "32", "-o", "out.safetensors"),
        "out.safetensors", "model/model.safetensors", 4,
    ),
    "eval": Command(
        ("eval", "quantized", *TEXT, "--window", "32", "--max-tokens", "96", "-o", "out.json"),
        "out.json", "quantized/model-00003-of-00005.safetensors", 4,
    ),
}  # fmt: skip


def kill(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(_: Path) -> None:
    """Let no file grow, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def break_reads(_: Path) -> None:
    """Let every further read of a shard fail, as a broken disk would."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shards: Any = vllm_moeq.format.shards
    shards.mmap = type("Broken", (), {**vars(mmap), "mmap": fail})
    shards.os = type("Broken", (), {**vars(os), "preadv": fail})
    shards.ShardSet._open = lambda *_: SimpleNamespace(get_tensor=fail)


def replace_shard(path: Path) -> None:
    """Put a file with the same header and other weights in its place."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def use_up_memory(_: Path) -> None:
    """Let this process have no more memory than it has, and nothing left of that."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    held: list[bytearray] = []
    piece = 1 << 20
    while piece >= 1 << 12:
        try:
            held.append(bytearray(piece))
        except MemoryError:
            piece //= 2
    try:
        torch.empty(1 << 20)
    finally:
        held.clear()  # as when the run's own tensors go


def wait_for_other(path: Path) -> None:
    """Say that the lock is held, and wait until the other run has come and gone."""
    (path.parents[1] / "locked").touch()
    while not (path.parents[1] / "other").exists():
        time.sleep(0.01)


FAULTS: dict[str, Callable[[Path], None]] = {
    "kill -9": kill,
    "disk full": fill_disk,
    "read error": break_reads,
    "source replaced": replace_shard,
    "out of memory": use_up_memory,
    "second writer": wait_for_other,
}


def run(folder: Path, command: Command, fault: Callable[[Path], None] | None = None) -> tuple[int, str]:
    """Run a command in a child of this process, where everything is imported; return exit status and last line."""
    reader, writer = os.pipe()  # no file: the disk may be full
    process = start(folder, command, fault, writer)
    os.close(writer)
    with os.fdopen(reader) as output:
        lines = output.read().splitlines()
    process.join()
    return process.exitcode or 0, lines[-1] if lines else ""


def start(folder: Path, command: Command, fault: Callable[[Path], None] | None, output: int) -> Any:
    process = FORK.Process(target=_child, args=(folder, command, fault, output))
    process.start()
    return process


def _child(folder: Path, command: Command, fault: Callable[[Path], None] | None, log: int) -> None:
    os.chdir(folder)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)
    if fault is not None:
        _at_write(command.writes, lambda: fault((folder / command.reads).absolute()))
    sys.argv = ["moeq", *command.arguments]
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _at_write(number: int, fault: Callable[[], None]) -> None:
    """Have a fault happen when a file is about to get its name, for the ``number``-th time: two syncs are one write."""
    sync, count = planner.output.files.sync, 0

    def counted(path: Path) -> None:
        nonlocal count
        count += 1
        if count == 2 * number - 1:
            fault()
        sync(path)

    planner.output.files.sync = counted


def prepare(folder: Path, quantized: Path) -> Path:
    folder.mkdir()
    shutil.copytree(MIXTRAL, folder / "model", ignore=shutil.ignore_patterns("held_out.txt"))
    shutil.copytree(quantized, folder / "quantized")
    (folder / "text.txt").write_text((MIXTRAL / "held_out.txt").read_text()[:3000])
    return folder

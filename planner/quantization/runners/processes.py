"""Run several tasks at once, each in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import torch

from planner.common.memory import return_large_blocks
from planner.quantization.layer_task import Finished
from planner.quantization.runners.base import CONTINUES, Failure, Result, Task, Work, attempt, checked
from vllm_moeq.format import MoeqError

SECONDS_TO_STOP = 5.0


@dataclass(frozen=True)
class ProcessRunner:
    """Runs tasks in several processes, one per entry of ``devices``.

    Attributes:
        threads: number of threads that compute in each process.
        devices: one torch device per process.
        start_method: start method of multiprocessing; CUDA and threads need ``spawn``.
    """

    threads: int
    devices: Sequence[str]
    start_method: str = "spawn"

    def run(self, work: Work) -> Generator[Finished, None, None]:
        """See :class:`planner.quantization.runners.base.Runner`."""
        yield from self.each(work.pending)

    def each(self, tasks: Sequence[Task[Result]]) -> Generator[Result, None, None]:
        """Yield the results of tasks of any kind, in the order in which the tasks end."""
        waiting = deque(tasks)
        workers: list[_Worker] = []
        try:
            with _without_interrupts(), _without_main():
                workers += [_Worker(self, device) for device in self.devices[: len(waiting)]]
            for worker in workers:
                worker.give(waiting.popleft())
            while busy := {worker.pipe: worker for worker in workers if worker.task}:
                for ready in wait(list(busy)):
                    worker = busy[ready]  # type: ignore[index]
                    outcome = worker.take()
                    if waiting and not isinstance(outcome, Failure):
                        worker.give(waiting.popleft())
                    yield checked(outcome)
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """The parent's view of one process: its pipe, and its current task."""

    def __init__(self, runner: ProcessRunner, device: str) -> None:
        context: Any = get_context(runner.start_method)  # typeshed has no type for an arbitrary context
        pipes: tuple[Connection, Connection] = context.Pipe()
        self.pipe, theirs = pipes
        arguments = (theirs, runner.threads, device)
        self.process: BaseProcess = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe closes when the process ends
        self.task: Task[Any] | None = None

    def give(self, task: Task[Any]) -> None:
        self.task = task
        try:
            self.pipe.send(task)
        except OSError:
            raise MoeqError(self._death(task)) from None

    def take(self) -> Any:
        """Return the task's result or failure. Call it when the pipe is ready: the process has answered or died."""
        if self.task is None:
            raise RuntimeError("expected a task")
        task, self.task = self.task, None
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return Failure(task.label, self._death(task), expected=True)

    def _death(self, task: Task[Any]) -> str:
        self.process.join(SECONDS_TO_STOP)
        code = self.process.exitcode
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (out of memory? fewer --jobs take less)" if code == -signal.SIGKILL else ""
        else:
            how = f"ended with status {code}"
        return f"{task.label}: its process {how}; {CONTINUES}"

    def stop(self) -> None:
        """End the process at once. This is safe because shards are written atomically."""
        self.pipe.close()
        self.process.terminate()
        self.process.join(SECONDS_TO_STOP)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Make processes that start meanwhile ignore Ctrl-C. A terminal sends it to all; the parent ends its processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes that start meanwhile from running the program's script: they need none of it.

    A script that calls a function of ours would call it again in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection, threads: int, device: str) -> None:
    """Run tasks from the pipe until it closes."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    return_large_blocks()
    torch.set_num_threads(threads)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(task, threads, device))


def _follow_parent() -> None:
    """End this process with its parent: a task must not write into a folder that another run has claimed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

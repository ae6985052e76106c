"""The interface of all runners, and the transport of a task's result or error between processes."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from planner.common.memory import out_of_memory
from planner.quantization.layer_task import Finished, LayerTask
from vllm_moeq.format import MoeqError

CONTINUES = "finished layers are kept, and the same command continues behind them"


@dataclass(frozen=True)
class Work:
    """The tasks of a run, in order.

    Attributes:
        tasks: all tasks.
        pending: tasks that no earlier run has finished.
    """

    tasks: tuple[LayerTask, ...]
    pending: tuple[LayerTask, ...]


Result = TypeVar("Result")
Made = TypeVar("Made", covariant=True)


class Task(Protocol[Made]):
    """A picklable task."""

    @property
    def label(self) -> str:
        """Name of the task in messages."""
        ...

    def run(self, threads: int, device: torch.device) -> Made:
        """Do the work and return its result.

        Raises:
            MoeqError: the task failed.
        """
        ...


class Runner(Protocol):
    """Runs the pending tasks, in any place."""

    def run(self, work: Work) -> Generator[Finished, None, None]:
        """Yield each pending task once its shard is written, in any order.

        Closing the generator stops the running tasks.

        Raises:
            MoeqError: a task failed.
        """
        ...


@dataclass(frozen=True)
class Failure:
    """A task's error as text, since not every exception can be pickled."""

    label: str
    message: str
    expected: bool

    def error(self) -> Exception:
        """Return the exception to raise."""
        if self.expected:
            return MoeqError(self.message)
        return RuntimeError(f"{self.label}: unexpected error\n{self.message}")


def attempt(task: Task[Result], threads: int, device: str) -> Result | Failure:
    """Run a task; return its error instead of raising it."""
    try:
        return task.run(threads, torch.device(device))
    except MoeqError as error:
        return Failure(task.label, str(error), expected=True)
    except Exception as error:
        if out_of_memory(error):
            return Failure(task.label, f"{task.label}: not enough memory on {device}; {CONTINUES}", expected=True)
        return Failure(task.label, traceback.format_exc(), expected=False)


def checked(outcome: Result | Failure) -> Result:
    """Return a task's result, or raise its error."""
    if isinstance(outcome, Failure):
        raise outcome.error()
    return outcome

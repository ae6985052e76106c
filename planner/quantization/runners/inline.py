"""Run one layer after the other in this process."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from planner.quantization.layer_task import Finished
from planner.quantization.runners.base import Work, attempt, checked


@dataclass(frozen=True)
class InlineRunner:
    """Runs tasks in this process, on one device.

    Attributes:
        threads: number of threads that compute.
        device: torch device.
    """

    threads: int
    device: str = "cpu"

    def run(self, work: Work) -> Generator[Finished, None, None]:
        """See :class:`planner.quantization.runners.base.Runner`."""
        for task in work.pending:
            yield checked(attempt(task, self.threads, self.device))

"""The keyword arguments of lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from planner.api.keywords.common import Count, PathName, one_of, parts
from planner.evaluation.lm_eval_backends import TASK_BACKENDS
from planner.evaluation.lm_eval_tasks import PAPER_SUITE
from planner.evaluation.run import EvaluationRequest
from vllm_moeq.format import UsageError

SUITES = {"paper": PAPER_SUITE}
"""Lists of tasks by name."""

TaskList = Sequence[PathName] | str
"""Names or YAML files of tasks, or a flag's text."""


@dataclass(frozen=True, kw_only=True)
class TaskKeywords:
    """The tasks that a model answers.

    Attributes:
        tasks: names of lm-eval's tasks, or YAML files, which may run code, such as ``("piqa", "my_task.yaml")``.
        suite: instead of ``tasks``: ``paper`` for the paper's eight.
        limit: documents of each task; None for all.
        backend: program that answers: ``transformers`` or ``vllm``.
        batch_size: windows, or sequences of tasks, at a time; None for the default.
    """

    tasks: TaskList | None = None
    suite: Annotated[str, one_of(SUITES)] | None = None
    limit: Count | None = None
    backend: Annotated[str, one_of(TASK_BACKENDS)] = EvaluationRequest.backend
    batch_size: Count | None = None

    def task_names(self) -> tuple[str, ...]:
        """Return the names or files of the tasks, each once.

        Raises:
            UsageError: both lists, or an empty name.
        """
        if self.tasks is not None and self.suite is not None:
            raise UsageError("--tasks and --suite: expected one of them, found both")
        if self.suite is not None:
            return SUITES[self.suite]
        names = () if self.tasks is None else tuple(dict.fromkeys(parts(self.tasks)))
        if "" in names:
            raise UsageError(f"--tasks: expected names or files such as piqa,arc_easy, found {self.tasks!r}")
        return names

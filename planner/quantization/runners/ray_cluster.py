"""Run layers on the machines of a Ray cluster with a shared file system."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from planner.common.install import require
from planner.quantization.layer_task import Finished, LayerTask
from planner.quantization.runners.base import CONTINUES, Failure, Work, attempt, checked
from vllm_moeq.format import MoeqError, UsageError


@dataclass(frozen=True)
class RayRunner:
    """Runs tasks on the cluster that Ray finds (``RAY_ADDRESS``), or on a local one that Ray starts.

    Attributes:
        jobs: number of tasks at a time; None for one per machine, or per GPU with ``cuda``.
        device: ``cpu`` or ``cuda``; with ``cuda`` each task has a GPU of its own.
        threads: number of threads that compute in each task; None for an equal share of the cluster.
    """

    jobs: int | None = None
    device: str = "cpu"
    threads: int | None = None

    def run(self, work: Work) -> Generator[Finished, None, None]:
        """See :class:`planner.quantization.runners.base.Runner`."""
        ray = import_ray()
        started = not ray.is_initialized()
        if started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        try:
            yield from self._run(ray, work)
        finally:
            if started:
                ray.shutdown()

    def _run(self, ray: Any, work: Work) -> Generator[Finished, None, None]:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if self.device != "cpu" else 0
        if self.device != "cpu" and not gpus:
            raise UsageError(f"--device {self.device}: the Ray cluster has no GPUs")
        machines = sum(1 for node in ray.nodes() if node["Alive"])
        jobs = self.jobs or gpus or machines
        threads = self.threads or max(1, int(resources.get("CPU", 1)) // max(jobs, machines))
        remote = ray.remote(attempt).options(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=0)
        waiting = deque(work.pending)
        running: dict[Any, LayerTask] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.popleft()
                    running[remote.remote(task, threads, self.device)] = task
                for ready in ray.wait(list(running), num_returns=1)[0]:
                    task = running.pop(ready)
                    try:
                        outcome: Finished | Failure = ray.get(ready)
                    except ray.exceptions.RayError as error:
                        why = type(error).__name__
                        raise MoeqError(f"{task.label}: its Ray worker is gone ({why}); {CONTINUES}") from None
                    yield checked(outcome)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def import_ray() -> Any:
    """Return the ray package.

    Raises:
        UsageError: Ray is not installed.
    """
    require("--ray", ("ray",), "ray")
    import ray

    return ray

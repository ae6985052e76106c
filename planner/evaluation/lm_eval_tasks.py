"""Score a model on tasks of lm-eval, the EleutherAI harness. Each score is saved at once."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from planner.common.install import require
from planner.common.progress import Progress
from planner.evaluation.lm_eval_backends import DEFAULT_TASK_BACKEND, TASK_BACKENDS
from planner.evaluation.lm_eval_task_files import known_tasks, load_tasks, reason_of
from planner.evaluation.record import TaskResult
from planner.output.files import write_json
from planner.quantization.runners.choose import read_devices
from vllm_moeq.format import CheckpointError, UsageError, read_config_json, read_json

PAPER_SUITE: tuple[str, ...] = (
    "piqa",
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "winogrande",
    "mathqa",
    "mmlu",
)
"""lm-eval's names of the eight zero-shot tasks in the paper's Table 1, in the table's order."""


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    backend: str = DEFAULT_TASK_BACKEND,
    store: Path | None = None,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Score a model on tasks. A task defines the number of examples in its prompts (lm-eval's default: none).

    This sets the global seeds of random, numpy and torch.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        tasks: names of lm-eval's tasks, groups and tags, or paths of task YAML files. Such files, and the files beside
            them, may name Python functions; these are run.
        include: a folder with further task files; they take precedence over lm-eval's tasks of the same name.
        limit: use only the first ``limit`` documents of each task, at least 1; None for all.
        batch_size: sequences at a time; None for the backend's default.
        device: ``cpu``, ``cuda`` or one GPU such as ``cuda:1``; for vLLM also a list of GPUs, which share the model.
        seed: seed for the choice of examples in prompts, and for bootstrap standard errors.
        backend: a row of :data:`planner.evaluation.lm_eval_backends.TASK_BACKENDS`.
        store: folder with one result per task; a task with a result there is not run again.
        progress: shows the progress; None shows none.

    Returns:
        The scores in the order of ``tasks``; the members' scores for a group without a score of its own.

    Raises:
        MoeqError: lm-eval is not installed, an unknown task, a dataset that cannot be loaded, a missing device, a
            damaged checkpoint.
    """
    runs, size = TASK_BACKENDS[backend], batch_size or TASK_BACKENDS[backend].sequences
    if not tasks or ("," in device and not runs.several_devices):
        raise UsageError(f"expected at least one task and one device, found {len(tasks)} and {device!r}")
    devices = read_devices(device)
    read_config_json(folder / "config.json")
    require_lm_eval()
    results: list[TaskResult] = []
    with _quiet(), ExitStack() as stack:
        loaded, model = load_tasks(list(dict.fromkeys(tasks)), include), None
        for number, (name, task) in enumerate(loaded.items(), start=1):
            path = None if store is None else store / _file_name(name)
            if path is not None and path.is_file():
                results += map(TaskResult.model_validate, read_json(path))
                continue
            if progress is not None:
                progress.line(f"task {number} of {len(loaded)}: {name}")
            model = model or stack.enter_context(runs.open(folder, devices, size, store, progress))
            scores = _finite(_scores(_evaluate(model, name, task, limit, seed), name), folder)
            found = [TaskResult(**values, limit=limit, backend=backend) for values in scores]
            if path is not None:
                write_json(path, [result.model_dump() for result in found])
            results += found
    return results


def _file_name(task: str) -> str:
    return f"result-{hashlib.sha256(task.encode()).hexdigest()[:16]}.json"


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that lm-eval does not know, before any work. Their datasets are not loaded.

    Raises:
        UsageError: an unknown task, no such file, lm-eval is not installed.
    """
    require_lm_eval()
    with _quiet():
        known_tasks(list(tasks), None)


def require_lm_eval(what: str = "tasks") -> None:
    """Require lm-eval, and what it needs to ask transformers' models.

    Args:
        what: what needs it, for the message.

    Raises:
        UsageError: a package is not installed.
    """
    require(what, ("lm_eval", "transformers", "accelerate"), "eval")
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:  # lm-eval without all that it needs
        require(what, (str(error.name),), "eval")
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Show lm-eval's errors and progress bars; hide its other messages, and the bars of loading models and datasets."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _evaluate(model: Any, name: str, task: Any, limit: int | None, seed: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # An empty task manager, since the default one would read all of lm-eval's files again.
    manager = TaskManager(include_defaults=False)
    try:
        results: dict[str, Any] = simple_evaluate(
            model, tasks=[task], limit=limit, log_samples=False, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed, task_manager=manager,
        )  # fmt: skip
    except ValueError as error:
        # The task runs code that the model writes, or it has no documents.
        raise UsageError(f"task {name}: expected tasks that lm-eval can run, found: {reason_of(error)}") from None
    return results


def _scores(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the scores of a task or group; for a group without a score, those of its members."""
    result = results["results"][name]
    metrics = [key for key in result if "," in key and "_stderr," not in key]
    if not metrics:
        return [score for member in results["group_subtasks"].get(name, ()) for score in _scores(results, member)]
    return [_score(name, result, key) for key in metrics]


def _finite(scores: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return scores; refuse infinite ones and no numbers, which say nothing of a model.

    Raises:
        CheckpointError: naming the model and the task.
    """
    for score in scores:
        if not math.isfinite(score["value"]):
            raise CheckpointError(
                f"{folder}: task {score['task']}: expected a finite {score['metric']}, found {score['value']:g}: the "
                "model's outputs are not finite"
            )
    return scores


def _score(name: str, result: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the score under a key such as ``acc,none``. A filter of answers becomes part of the metric's name."""
    metric, filtered_by = key.split(",", 1)
    stderr = result.get(f"{metric}_stderr,{filtered_by}")
    return {
        "task": name,
        "metric": metric if filtered_by == "none" else key,
        "value": float(result[key]),
        "stderr": float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
        "samples": int(result.get("sample_count", {}).get(key, result["sample_len"])),
    }

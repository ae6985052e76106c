"""The docstring of a function whose arguments are the fields of a dataclass: what the fields' docstrings say."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable

WIDTH = 100
ENTRY = re.compile(r"^    (\w+): ", re.MULTILINE)
"""The beginning of a field's description in the section of attributes."""


def with_arguments(text: str | None, kind: type, names: Iterable[str]) -> str:
    """Return a docstring with a section of arguments, before that of errors.

    Args:
        text: a docstring without the section; there is none where Python runs without docstrings.
        kind: the dataclass; its docstring and those of its bases describe the fields as attributes.
        names: the arguments to describe, in their order.
    """
    known = {name: words for base in reversed(kind.__mro__) for name, words in _attributes(base.__doc__).items()}
    lines = [_entry(name, known[name]) for name in names if name in known]
    before, errors, after = inspect.cleandoc(text or "").partition("\nRaises:\n")
    return "\n".join([before.rstrip(), "", "Args:", *lines, errors + after] if lines else [before + errors + after])


def _attributes(text: str | None) -> dict[str, str]:
    """Return the name of each attribute that a class's docstring describes → the description, on one line."""
    _, _, section = inspect.cleandoc(text or "").partition("\nAttributes:\n")
    section = re.split(r"\n\n\S", section)[0]
    found = ENTRY.split(section)[1:]
    return {name: " ".join(words.split()) for name, words in zip(found[::2], found[1::2], strict=True)}


def _entry(name: str, words: str) -> str:
    return textwrap.fill(f"{name}: {words}", WIDTH, initial_indent="    ", subsequent_indent=" " * 8)

"""Refuse data in one line: before pydantic sees it if it is too much, else with pydantic's first problem."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from vllm_moeq.format.errors import ConfigError

OURS = "Value error, "
"""What pydantic puts before the message of a check of ours."""


def refuse_crowds(data: Any, where: str, most: int, others: Mapping[str, int] = MappingProxyType({})) -> None:
    """Refuse an object with too many keys, because pydantic would first collect an error for each of them.

    Args:
        data: the parsed JSON value, at most 64 levels deep.
        where: its name in error messages.
        most: the largest allowed number of keys of one object.
        others: place of an object, such as ``linear.widths`` → its own number instead of ``most``.

    Raises:
        ConfigError: an object has more keys; the message names it.
    """
    waiting: list[tuple[str, Any]] = [("", data)]
    while waiting:
        place, value = waiting.pop()
        if not isinstance(value, dict):
            continue
        bound = others.get(place, most)
        if len(value) > bound:
            raise ConfigError(f"{where}: {place or 'the object'}: expected at most {bound} keys, found {len(value)}")
        for key, child in value.items():
            waiting.append((f"{place}.{key!s:.80}".removeprefix("."), child))


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one line: the place, the problem and the value found.

    A check that compares the keys of the whole object says what it found: the object would say nothing.
    """
    problem = error.errors(include_url=False)[0]
    parts = (str(part) for part in problem["loc"])
    place = ".".join(f"{part if part.isprintable() else repr(part):.512}" for part in parts)
    message = str(problem["msg"]).removeprefix(OURS)
    if problem["type"] == "value_error" and not place:
        return message
    place = place or "the object"
    found = repr(problem["input"])
    found = found if len(found) <= 80 else found[:77] + "..."
    return f"{place}: {message} (found {found})"

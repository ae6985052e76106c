"""Types that several groups of keyword arguments share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, ConfigDict, Field

from planner.common.progress import Event, Progress

PathName = str | Path
"""A path, or what becomes one."""

Listener = Progress | Callable[[Event], object]
"""What a run tells its progress: a function of an :class:`Event`, such as ``print``, or the display of the commands."""

Count = Annotated[int, Field(ge=1)]
"""A positive number."""

Tokens = Annotated[int, Field(ge=2)]
"""The least number of tokens of which one can be predicted."""

SequenceLength = Annotated[int, Field(ge=16)]
"""Tokens of a calibration sequence."""


@dataclass(frozen=True, kw_only=True)
class ProgressKeyword:
    """Whom a run tells its progress.

    Attributes:
        progress: called with an :class:`Event` for each note, and every ten seconds of a long run; ``print`` shows
            them. A :class:`Progress` is the display of the commands. None stays silent.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    progress: Listener | None = None

    def display(self) -> Progress:
        """Return what shows the progress."""
        if isinstance(self.progress, Progress):
            return self.progress
        return Progress(quiet=self.progress is None, listener=self.progress)


def one_of(names: Iterable[str]) -> AfterValidator:
    """Return the check that a text is one of some names, which may come from a table."""
    known = tuple(names)

    def checked(value: str) -> str:
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return value

    return AfterValidator(checked)


def parts(value: object) -> tuple[str, ...]:
    """Return the texts of a list: of a flag's, such as ``kl,pmq``, or of a sequence or a single value."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return tuple(str(value).split(","))
    return tuple(map(str, value))

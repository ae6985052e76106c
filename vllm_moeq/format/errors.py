"""The one kind of error that a user can cause and mend."""

from __future__ import annotations


class MoeqError(Exception):
    """A file, tensor or flag is not what it has to be.

    The message names the thing, what was expected and what was found; commands print it as one
    line and exit with status 2. Names in it come from files that anybody may have made: what could steer a terminal is
    shown as an escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return text in which nothing but line breaks moves a cursor, changes colours or reorders characters."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class CheckpointError(MoeqError):
    """A checkpoint's files or tensors are damaged, missing or of the wrong shape."""


class ConfigError(MoeqError):
    """A configuration, plan or overrides file does not follow its schema."""


class UsageError(MoeqError):
    """A flag's value is impossible, alone or together with another flag."""

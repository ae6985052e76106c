"""The errors that a user can cause and fix; all are :class:`MoeqError`."""

from __future__ import annotations


class MoeqError(Exception):
    """A file, tensor or flag is wrong.

    The message says what is wrong, what was expected and what was found. Commands print it as one line and exit with
    status 2. Names in it come from untrusted files, so characters that could control a terminal are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return the text with all unprintable characters except line breaks replaced by escapes."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class CheckpointError(MoeqError):
    """A checkpoint's files or tensors are damaged, missing or of the wrong shape."""


class ConfigError(MoeqError):
    """A configuration, plan or overrides file does not follow its schema."""


class UsageError(MoeqError):
    """A flag's value is impossible, alone or together with another flag."""

"""The one kind of error that a user can cause and mend."""

from __future__ import annotations


class MoeqError(Exception):
    """A file, tensor or flag is not what it has to be.

    The message names the thing, what was expected and what was found; commands print it as one
    line and exit with status 2.
    """


class CheckpointError(MoeqError):
    """A checkpoint's files or tensors are damaged, missing or of the wrong shape."""


class ConfigError(MoeqError):
    """A configuration, plan or overrides file does not follow its schema."""


class UsageError(MoeqError):
    """A flag's value is impossible, alone or together with another flag."""

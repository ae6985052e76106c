"""Tell a user's mistake, or a lack of memory, from an error of ours."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from planner.common.memory import out_of_memory
from vllm_moeq.format import MoeqError, UsageError

OF_A_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EROFS)
"""Errors of the system that say what is wrong with a path that the user gave."""


@contextmanager
def named_mistakes() -> Iterator[None]:
    """Turn the system's errors that a user can mend into ours, with a message of one line; let others pass.

    Raises:
        MoeqError: a mistake, or not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            raise MoeqError("not enough memory; what is finished is kept") from error
        if isinstance(error, OSError) and error.errno in OF_A_PATH and error.filename is not None:
            raise UsageError(f"{error.filename}: {error.strerror}") from error
        raise

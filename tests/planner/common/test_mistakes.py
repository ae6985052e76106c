"""Which errors of the system are a user's mistakes."""

from __future__ import annotations

import errno
import os

import pytest

from planner.common.mistakes import named_mistakes
from vllm_moeq.format import ConfigError, MoeqError

FULL = "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


def of_system(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory; what is finished is kept"),
        (RuntimeError(FULL), "not enough memory; what is finished is kept"),
        (of_system(errno.ENOMEM), "not enough memory; what is finished is kept"),
        (of_system(errno.ENAMETOOLONG, "long"), "long: File name too long"),
        (of_system(errno.EACCES, "secret"), "secret: Permission denied"),
        (ConfigError("file: expected this, found that"), "file: expected this, found that"),
    ],
)
def test_mistakes_get_one_line(error: Exception, message: str) -> None:
    with pytest.raises(MoeqError) as found, named_mistakes():
        raise error
    assert str(found.value) == message


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), of_system(errno.EIO, "disk"), of_system(errno.EACCES), ValueError()]
)
def test_our_own_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as found, named_mistakes():
        raise error
    assert found.value is error

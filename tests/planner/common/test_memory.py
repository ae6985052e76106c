"""Errors that mean that memory ran out, and those that do not."""

from __future__ import annotations

import errno

import pytest
import torch

from planner.common.memory import out_of_memory


def test_a_tensor_that_no_machine_can_hold() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), OSError(errno.ENOMEM, "mmap")])
def test_memory_ran_out(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), OSError(errno.EIO, "read"), ValueError()])
def test_something_else(error: Exception) -> None:
    assert not out_of_memory(error)

"""Triton's interpreter with bounds: it stops a kernel that touches memory outside the arguments of its launch.

On a GPU such an access may hit another tensor or an unmapped page, depending on the allocator; here every one shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

Span = tuple[str, int, int]
"""An argument's name, its first byte and the byte behind its last one."""


def span_of(name: str, tensor: torch.Tensor) -> Span:
    """Return where a contiguous tensor lies."""
    return name, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def check(spans: list[Span], pointers: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
    """Raise an error unless every chosen pointer, with ``size`` bytes behind it, lies within one of the spans.

    Raises:
        IndexError: a pointer does not.
    """
    left = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
    for _, begin, end in spans:
        left = left[(left < begin) | (left + size > end)]
    if len(left):
        name, begin, end = min(spans, key=lambda span: min(abs(int(left[0]) - edge) for edge in span[1:]))
        raise IndexError(f"{what} of {size} bytes at byte {left[0] - begin} near {name}, which has {end - begin}")


@contextmanager
def bounded() -> Iterator[list[str]]:
    """Check every access of the kernels that are launched inside; the result lists the launches."""
    spans: list[Span] = []
    launches: list[str] = []
    prepare = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted(executor: GridExecutor, arguments: Any, keywords: Any) -> Any:
        found = prepare(executor, arguments, keywords)
        tensors = zip(executor.arg_names, found[0], strict=False)
        spans[:] = [span_of(name, value) for name, value in tensors if isinstance(value, torch.Tensor)]
        launches.append(executor.fn.__name__)
        return found

    def checked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(spans, pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, "read")
        return load(builder, pointers, mask, *rest)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(spans, pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, "write")
        return store(builder, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "_init_args_hst", noted)
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        yield launches

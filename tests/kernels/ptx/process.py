"""A process in which Triton compiles: in that of the tests it interprets, from its first import on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}


class Call(Protocol):
    """Calls a function of the other process."""

    def __call__(self, name: str, *args: Any) -> Any:
        """Return what the function gives; ``name`` is its module in this folder and its own name."""
        ...


def prepare(cache: Path) -> None:
    """Set the process up before it imports Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(ENVIRONMENT, TRITON_CACHE_DIR=str(cache))


def call(name: str, args: tuple[Any, ...]) -> Any:
    """Call a function by the name of its module in this folder and its own."""
    module, function = name.split(".")
    return getattr(importlib.import_module(f"tests.kernels.ptx.{module}"), function)(*args)


@contextmanager
def compiling(cache: Path) -> Iterator[Call]:
    """Start such a process, which keeps compiled kernels in a folder."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare, initargs=(cache,)) as pool:
        yield lambda name, *args: pool.submit(call, name, args).result()

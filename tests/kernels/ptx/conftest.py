"""The process that compiles and emulates, one for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.ptx.process import Call, compiling


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Return a function that calls others where Triton compiles: "tutorial.vectors", "sm_80"."""
    with compiling(tmp_path_factory.mktemp("triton")) as call:
        yield call

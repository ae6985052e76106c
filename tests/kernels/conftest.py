"""Without a GPU the kernels run under Triton's interpreter (``tests/conftest.py`` has it define them)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter looks at the variable again while a kernel runs."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")

"""Without a GPU the kernels run under Triton's interpreter (``tests/conftest.py`` has it define them)."""

from __future__ import annotations

import pytest
import torch

from vllm_moeq.kernels.cpu.layer import ISA_VARIABLE, instruction_sets


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter looks at the variable again while a kernel runs."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the native kernels with each of the processor's instruction sets."""
    monkeypatch.setenv(ISA_VARIABLE, request.param)

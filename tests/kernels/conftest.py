"""Without a GPU the kernels run under Triton's interpreter, which has to be asked for before they are defined."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("vllm_moeq.kernels.triton.layer")
    del os.environ["TRITON_INTERPRET"]  # servers that other tests start must not inherit it


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter looks at the variable again while a kernel runs."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")

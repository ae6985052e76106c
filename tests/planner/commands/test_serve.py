"""``moeq serve`` refuses what cannot work before vLLM starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from planner.commands.serve import check_flags
from tests.conftest import Outcome, one_line
from vllm_moeq.format import UsageError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--enable-eplb"], "--enable-eplb: experts of different widths"),
        (["--port", "1", "--model", "other"], "--model: DIR is the model"),
        (["--quantization", "awq"], "--quantization: expected moeq, which config.json names, found awq"),
        (["--quantization=gptq"], "found gptq"),
        (["-q"], "-q: expected moeq"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_flags(flags)


def test_other_flags_pass() -> None:
    check_flags(["--quantization", "moeq", "--max-model-len", "64", "--enable-expert-parallel", "-tp=2"])


def test_a_refusal_is_one_line(moeq: Callable[..., Outcome], quantized_mixtral: Path) -> None:
    assert "--enable-eplb" in one_line(moeq("serve", quantized_mixtral, "--enable-eplb"))

"""What a shell is offered, asked as the completion script of bash asks."""

from __future__ import annotations

import os
import subprocess

import pytest

from planner.commands.completion import one_of, some_of
from tests.paths import MOEQ

pytestmark = pytest.mark.slow


def test_the_last_name_of_a_list_is_completed() -> None:
    complete = some_of(["kl", "kl-estimated", "pmq"])
    assert complete("pmq,k") == ["pmq,kl", "pmq,kl-estimated"]
    assert complete("kl,k") == ["kl,kl-estimated"]
    assert complete("") == ["kl", "kl-estimated", "pmq"]
    assert one_of(["kl", "pmq"])("p") == ["pmq"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("moeq quantize --method kl", {"kl", "kl-estimated"}),
        ("moeq compare --methods pmq,gem", {"pmq,gemq"}),
        ("moeq calibrate --for pm", {"pmq"}),
        ("moeq qu", {"quantize"}),
        ("moeq eval --suite p", {"paper"}),
    ],
)
def test_bash_is_offered(words: str, expected: set[str]) -> None:
    asked = {"_MOEQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    reply = subprocess.run([MOEQ], env={**os.environ, **asked}, capture_output=True, text=True, check=True).stdout
    assert set(reply.split()) == expected

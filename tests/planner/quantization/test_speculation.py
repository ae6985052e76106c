"""A checkpoint without layers for speculative decoding does not announce them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.quantization.speculation import without_speculation
from tests.conftest import Outcome
from vllm_moeq.format.speculation import COUNTS


def test_counts_become_none_at_every_depth() -> None:
    found = without_speculation(
        {"num_nextn_predict_layers": 1, "hidden_size": 4, "text_config": {"mtp_num_hidden_layers": 2, "layers": [1]}}
    )
    assert found == {
        "num_nextn_predict_layers": 0,
        "hidden_size": 4,
        "text_config": {"mtp_num_hidden_layers": 0, "layers": [1]},
    }


def test_an_unset_count_stays_unset() -> None:
    assert without_speculation({"num_mtp_modules": None}) == {"num_mtp_modules": None}


def test_every_count_that_vllm_reads_is_known() -> None:
    speculative = pytest.importorskip("vllm.config.speculative")
    read = re.findall(r'"(\w*(?:nextn|mtp)\w*(?:layers|modules))"', inspect.getsource(speculative))
    assert read
    assert set(read) <= set(COUNTS)


@pytest.mark.slow
def test_the_written_config(
    mixtral_copy: Path,
    tmp_path: Path,
    moeq: Callable[..., Outcome],
    change_config: Callable[[Path, Callable[[dict[str, Any]], None]], None],
) -> None:
    change_config(mixtral_copy, lambda it: it.update(num_nextn_predict_layers=1))
    assert moeq("quantize", mixtral_copy, "--avg-bits", "2", "--group-size", "64", "-o", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0

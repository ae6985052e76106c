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
from vllm_moeq.format.speculation import COUNTS, JOINING, first_gap


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


WHOLE = [
    *(f"model.layers.3.{leaf}" for leaf in JOINING),
    "model.layers.3.mlp.gate.weight",
    *(f"model.layers.3.mlp.experts.{expert}.{name}_proj.weight" for expert in range(12) for name in ("up", "down")),
]


def test_a_whole_layer_lacks_nothing() -> None:
    assert first_gap(WHOLE) is None
    assert first_gap([]) is None
    assert first_gap(["mtp.fc.weight", "model.layers.3.mlp.gate.weight"]) is None


@pytest.mark.parametrize(
    "name", [*WHOLE[:3], *(name for name in WHOLE if ".experts." in name and ".11." not in name), WHOLE[-1], WHOLE[-2]]
)
def test_every_missing_tensor_is_named(name: str) -> None:
    assert first_gap(it for it in WHOLE if it != name) == name


def test_a_number_of_an_expert_costs_no_memory() -> None:
    gap = first_gap([*WHOLE, "model.layers.3.mlp.experts.99999999999.up_proj.weight"])
    assert gap == "model.layers.3.mlp.experts.99999999998.down_proj.weight"


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

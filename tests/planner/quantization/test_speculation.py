"""A checkpoint without layers for speculative decoding does not announce them."""

from __future__ import annotations

import inspect
import json
import re
import tracemalloc
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


EXPERTS = 12
WHOLE = [
    *(f"model.layers.3.{module}.weight" for module in JOINING),
    "model.layers.3.mlp.gate.weight",
    *(
        f"model.layers.3.mlp.experts.{expert}.{name}_proj.weight"
        for expert in range(EXPERTS)
        for name in ("up", "down")
    ),
]


def test_a_whole_layer_lacks_nothing() -> None:
    """Nor does one whose linears are encoded, nor one of another kind."""
    assert first_gap(WHOLE, EXPERTS) is None
    assert first_gap([name.replace("eh_proj.weight", "eh_proj.weight_packed") for name in WHOLE], EXPERTS) is None
    assert first_gap([], EXPERTS) is None
    assert first_gap(["mtp.fc.weight", "model.layers.3.mlp.gate.weight"], EXPERTS) is None


@pytest.mark.parametrize("name", [*WHOLE[:3], *(name for name in WHOLE if ".experts." in name)])
def test_every_missing_tensor_is_named(name: str) -> None:
    assert first_gap((it for it in WHOLE if it != name), EXPERTS) in (name, name.removesuffix(".weight"))


def test_missing_experts_are_named() -> None:
    few = [name for name in WHOLE if ".experts.11." not in name]
    assert first_gap(few, EXPERTS) == "model.layers.3.mlp.experts.11.down_proj.weight"
    assert first_gap(few) is None
    odd = [f"model.layers.3.mlp.experts.{expert}.up_proj.weight" for expert in (5, 6)]
    assert first_gap(odd) == "model.layers.3.mlp.experts.0.up_proj.weight"


def test_many_names_cost_no_time() -> None:
    """20,000 matrices of one expert, and an expert of the highest number."""
    names = [f"model.layers.3.mlp.experts.0.matrix{number}.weight" for number in range(20_000)]
    names += [f"model.layers.3.mlp.experts.{expert}.up_proj.weight" for expert in (1, 999_999_999)]
    tracemalloc.start()
    assert first_gap(names, EXPERTS) == "model.layers.3.mlp.experts.0.up_proj.weight"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


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

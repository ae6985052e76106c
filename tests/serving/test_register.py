"""The entry point: light to import, safe to call twice, found by vLLM."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from typing import Literal

import pytest
import torch

from vllm_moeq.format import ConfigError, Linear

pytestmark = pytest.mark.slow


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = run("import sys, vllm_moeq; print([m for m in ('torch', 'vllm', 'pydantic') if m in sys.modules])")
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("package", ["vllm_moeq.format", "vllm_moeq.kernels", "planner.allocation", "planner.cli"])
def test_everything_but_serving_imports_without_vllm(package: str) -> None:
    code = f"import sys; sys.modules['vllm'] = None; import {package}; print('imported')"
    assert run(code).strip() == "imported"


def test_entry_point_is_installed() -> None:
    names = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert names["moeq"] == "vllm_moeq:register"


def test_register_twice() -> None:
    code = (
        "import vllm_moeq; vllm_moeq.register(); vllm_moeq.register()\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config\n"
        "print(QUANTIZATION_METHODS.count('moeq'), get_quantization_config('moeq').__name__)"
    )
    assert run(code).splitlines()[-1] == "1 MoeqQuantizationConfig"


@pytest.mark.parametrize(
    ("bits", "dtype", "reason"),
    [(8, "bfloat16", "serve 4 bits, not 8"), (4, "float32", "half precision"), (8, "float32", "half precision")],
)
def test_linears_that_vllm_has_no_cpu_kernel_for(bits: Literal[4, 8], dtype: str, reason: str) -> None:
    from vllm_moeq.serving.linear_method import unserved

    found = unserved(Linear(bits=bits), getattr(torch, dtype))
    assert found is not None
    assert reason in found


def test_a_layer_is_found_under_the_name_that_a_model_class_gives_it() -> None:
    from vllm_moeq.serving.config import find_layer

    known = ["model.layers.0.block_sparse_moe.experts", "model.layers.10.block_sparse_moe.experts"]
    assert find_layer("model.layers.10.mlp.experts", known) == known[1]
    assert find_layer(known[0], known) == known[0]


def test_a_layer_without_widths_is_named() -> None:
    from vllm_moeq.serving.config import find_layer

    with pytest.raises(ConfigError, match=r"no widths for model\.layers\.1\.mlp\.experts"):
        find_layer("model.layers.1.mlp.experts", ["model.layers.0.mlp.experts"])

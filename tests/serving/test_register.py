"""The entry point: light to import, safe to call twice, found by vLLM."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest


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


def test_eight_bit_linears_are_refused_on_the_cpu() -> None:
    code = (
        "from vllm_moeq.serving.config import MoeqQuantizationConfig as C\n"
        "from vllm_moeq.format import UsageError\n"
        "config = {'quant_method': 'moeq', 'format_version': 1, 'group_size': 128,\n"
        "  'projections': {'gate': 'w1', 'up': 'w3', 'down': 'w2'}, 'experts': {'a.experts': [2]},\n"
        "  'linear': {'bits': 8, 'group_size': 128}, 'unquantized': [],\n"
        "  'plan': {'method': 'uniform', 'avg_bits': 2.0, 'achieved_avg_bits': 2.0, 'bit_choices': [2]}}\n"
        "try:\n    C.from_config(config)\nexcept UsageError as error:\n    print(error)"
    )
    assert "--linear-bits 4 or 16" in run(code)

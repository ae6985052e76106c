"""The loader against the sources of every transformers version that is said to be tested, and the one installed."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.compat.hooks import CALLS, METHODS, TABLE, used, version_of
from tests.compat.signatures import reader
from tests.compat.test_signatures import parameters
from tests.compat.transformers_versions import install, run
from tests.matches import first_match
from tests.paths import ROOT
from tests.supply.requires import project

VERSIONS: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
QUANTIZER = "transformers.quantizers.base:HfQuantizer"
PINNED = first_match(r"^transformers==(\d+\.\d+)\.", ROOT / "requirements" / "cpu.txt")[1]


def overridden() -> dict[str, inspect.Signature]:
    """Return the signatures of our quantizer's methods, from its source."""
    tree = ast.parse((ROOT / "vllm_moeq" / "hf" / "quantizer.py").read_text())
    ours = next(it for it in tree.body if isinstance(it, ast.ClassDef) and it.name == "MoeqHfQuantizer")
    methods = [it for it in ours.body if isinstance(it, ast.FunctionDef)]
    for node in (part for method in methods for part in ast.walk(method.args) if isinstance(part, ast.arg)):
        node.annotation = None
    return {it.name: parameters(f"({ast.unparse(it.args)})") for it in methods}


def test_versions_are_those_that_are_said_to_be_tested() -> None:
    first, last = min(VERSIONS), max(VERSIONS)
    major, minor = first.split(".")
    assert list(VERSIONS) == [f"{major}.{it}" for it in range(int(minor), int(last.split(".")[1]) + 1)]
    assert PINNED in VERSIONS
    extras = project()["optional-dependencies"]
    bounds = f"transformers>={first},<{major}.{int(last.split('.')[1]) + 1}"
    assert [text for texts in extras.values() for text in texts if text.startswith("transformers")] == [bounds]
    assert f"transformers {first} – {last}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_overridden_is_there_and_takes_what_transformers_passes(version: str) -> None:
    ours = overridden()
    base = VERSIONS[version][QUANTIZER]
    looked_at = METHODS["transformers.quantizers.base", "HfQuantizer"]
    assert {name for name in ours if of_base(name)} <= set(looked_at)
    for name in looked_at:
        assert base[name] is not None, f"transformers {version} has no HfQuantizer.{name}"
    for where, names in CALLS.items():
        for name in names:
            found = VERSIONS[version][f"{where}.calls"][name]
            assert found, f"transformers {version} never calls {name} in {where}"
            for arguments in found:
                call = ast.parse(f"it({arguments})", mode="eval").body
                assert isinstance(call, ast.Call)
                ours[name].bind(None, *call.args, **{it.arg or "": None for it in call.keywords})


def of_base(name: str) -> bool:
    """Tell whether the installed base class has a method of this name."""
    from transformers.quantizers.base import HfQuantizer

    return hasattr(HfQuantizer, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_called_takes_what_is_passed(version: str) -> None:
    table = VERSIONS[version]
    loading = "transformers.core_model_loading"
    parameters(table["transformers.conversion_mapping:get_model_conversion_mapping"]).bind(0)
    parameters(table[f"{loading}:rename_source_key"]).bind(0, 0, 0)
    parameters(table[f"{loading}:revert_weight_conversion"]).bind(0, 0)
    parameters(table[f"{loading}:WeightConverter"]["__init__"]).bind(0, 0, 0, operations=0)
    parameters(table["transformers.modeling_utils:PreTrainedModel"]["_get_dtype_plan"]).bind(0, 0)
    parameters(table[QUANTIZER]["__init__"]).bind(0, 0, pre_quantized=True)


def test_the_installed_transformers_is_as_the_table_says() -> None:
    spec = find_spec("transformers")
    assert spec is not None
    read = reader(Path(spec.origin or "").parents[1])
    assert used(read) == VERSIONS[version_of(read)]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", [it for it in VERSIONS if it != PINNED])
def test_models_load_calibrate_and_evaluate(version: str) -> None:
    try:
        install(version)
    except subprocess.CalledProcessError:
        pytest.skip(f"pip cannot install transformers {version} here")
    assert run(version) == 0

"""The seam against the sources of every vLLM version that is said to be tested, and against the one installed here."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vllm_moeq
from tests.compat.signatures import FIELDS, LAYERS, METHODS, TABLE, reader, used
from tests.matches import first_match
from tests.paths import ROOT

SERVING = Path(vllm_moeq.__file__).parent / "serving"
VERSIONS: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())

OURS = {
    "MoeqQuantizationConfig": ("config.py", f"{LAYERS}.quantization.base_config:QuantizationConfig"),
    "MoeqMoEMethod": ("moe_method.py", f"{LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase"),
    "PackedLinearMethod": ("linear_method.py", f"{LAYERS}.linear:UnquantizedLinearMethod"),
    "NativeLinearMethod": ("linear_method.py", f"{LAYERS}.linear:UnquantizedLinearMethod"),
    "UnpackedLinearMethod": ("linear_method.py", f"{LAYERS}.linear:UnquantizedLinearMethod"),
}


def imported(path: Path) -> list[tuple[str, str]]:
    """Return (module, name) of everything that a file imports from vLLM."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found += [(node.module or "", it.name) for it in node.names]
        if isinstance(node, ast.Import):
            found += [(it.name, "") for it in node.names if it.name.split(".")[0] == "vllm"]
    return found


def test_only_the_seam_imports_vllm() -> None:
    files = [*Path(vllm_moeq.__file__).parent.rglob("*.py"), *(ROOT / "planner").rglob("*.py")]
    assert [path for path in files if imported(path)] == [SERVING / "seam.py"]


def test_the_table_has_the_versions_that_are_said_to_be_tested() -> None:
    tested = ast.literal_eval(first_match(r"^TESTED = (.*)$", SERVING / "seam.py")[1])
    (major, first), (_, last) = tested
    assert list(VERSIONS) == [f"{major}.{minor}" for minor in range(first, last + 1)]
    bounds = first_match(r'gpu = \["vllm>=([\d.]+),(?:!=[\d.*]+,)*<([\d.]+)"', ROOT / "pyproject.toml").groups()
    assert bounds == (f"{major}.{first}", f"{major}.{last + 1}")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_of_the_seam_is_there(version: str) -> None:
    for module, name in imported(SERVING / "seam.py"):
        if name == "__version__":
            continue
        known = [key for key in VERSIONS[version] if key in (f"{module}:{name}", f"{module}:{name}.fields")]
        assert known, f"{module}:{name} is not in the table: add it to signatures.py"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_attribute_is_there(version: str) -> None:
    for (module, name), fields in FIELDS.items():
        assert VERSIONS[version][f"{module}:{name}.fields"] == sorted(fields)


def parameters(signature: str) -> inspect.Signature:
    """Return a signature from its text, defaults replaced."""
    node = ast.parse(f"def it{signature}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
    node.args.kw_defaults = [it and ast.Constant(None) for it in node.args.kw_defaults]
    space: dict[str, Any] = {}
    exec(f"def it({ast.unparse(node.args)}): ...", space)
    return inspect.signature(space["it"])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_overridden_takes_what_vllm_passes(version: str, name: str) -> None:
    """Every parameter of vLLM's method has one of the same name and place here, or goes into ``**``."""
    file, base = OURS[name]
    tree = ast.parse((SERVING / file).read_text())
    ours = next(it for it in tree.body if isinstance(it, ast.ClassDef) and it.name == name)
    mine = {it.name: it for it in ours.body if isinstance(it, ast.FunctionDef)}
    for method, text in VERSIONS[version][base].items():
        if text is None or method not in mine or method == "__init__":
            continue
        own = mine[method].args
        takes = [it.arg for it in (*own.posonlyargs, *own.args)]
        for place, parameter in enumerate(parameters(text).parameters.values()):
            if parameter.kind is parameter.VAR_KEYWORD:
                assert own.kwarg is not None, f"{name}.{method}"
            elif parameter.name in takes:
                assert takes.index(parameter.name) == place, f"{name}.{method}: {parameter.name}"
            else:
                assert own.kwarg is not None, f"{name}.{method}: {parameter.name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_called_takes_what_is_passed(version: str) -> None:
    table = VERSIONS[version]
    calls: list[tuple[str, str, tuple[int, ...], dict[str, Any]]] = [
        (f"{LAYERS}.fused_moe.fused_moe_method_base:FusedMoEMethodBase", "__init__", (0, 0), {}),
        ("vllm.model_executor.parameter:PackedvLLMParameter", "__init__", (0,),
         dict.fromkeys(("data", "input_dim", "output_dim", "packed_dim", "packed_factor", "weight_loader"))),
        ("vllm.model_executor.parameter:BasevLLMParameter", "__init__", (0,), {"data": 0, "weight_loader": 0}),
        (f"{LAYERS}.linear:UnquantizedLinearMethod", "process_weights_after_loading", (0, 0), {}),
        ("vllm.model_executor.models.utils:WeightsMapper", "apply_dict", (0, 0), {}),
        (f"{LAYERS}.fused_moe.expert_map_manager:ExpertMapManager", "map_global_to_local", (0, 0), {}),
        (f"{LAYERS}.quantization.compressed_tensors.compressed_tensors:CompressedTensorsConfig", "get_quant_method",
         (0, 0, 0), {}),
    ]  # fmt: skip
    for where, method, positional, named in calls:
        parameters(table[where][method]).bind(*positional, **named)
    parameters(table[f"{LAYERS}.quantization:register_quantization_config"]).bind("moeq")
    parameters(table["vllm.logger:init_logger"]).bind("vllm.moeq")


def test_methods_that_are_looked_at_are_ours_or_called() -> None:
    assert {base for _, base in OURS.values()} <= {f"{module}:{name}" for module, name in METHODS}


def test_the_installed_vllm_is_as_the_table_says() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(spec.origin).parent
    version = first_match(r"version = '(\d+\.\d+)\.", folder / "_version.py")[1]
    assert json.loads(json.dumps(used(reader(folder.parent)))) == VERSIONS[version]


@pytest.fixture
def seam() -> ModuleType:
    pytest.importorskip("vllm")
    return importlib.import_module("vllm_moeq.serving.seam")


def test_one_warning_outside_of_the_tested_range(
    seam: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam.logger, "propagate", False)  # to pytest's handler, as vLLM does or not
    seam.logger.addHandler(caplog.handler)
    for found in ("0.30.0", "0.33.2", "0.31.1rc1", "dev", "0.29.3", "0.29.3", "0.34.0", "1.0"):
        seam.warn_if_untested(found)
    seam.logger.removeHandler(caplog.handler)
    assert caplog.messages == [
        f"moeq: tested with vLLM 0.30 to 0.33, found {found}" for found in ("0.29.3", "0.34.0", "1.0")
    ]


def test_a_name_that_moved_is_named_with_the_versions(seam: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.config

    monkeypatch.delattr(vllm.config, "get_current_vllm_config")
    monkeypatch.delattr(vllm.config, "__getattr__", raising=False)
    monkeypatch.delitem(sys.modules, seam.__name__)
    with pytest.raises(ImportError, match=r"tested with vLLM 0\.30 to 0\.33, found .*get_current_vllm_config"):
        importlib.import_module(seam.__name__)

"""What this project uses of vLLM, read from the sources of a wheel or an installed package; nothing is imported.

To renew the table, or to add a version to it:

    pip download --no-deps --only-binary :all: vllm==0.33.0 -d wheels
    python -m tests.compat.signatures wheels/*.whl
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("vllm.json")
LAYERS = "vllm.model_executor.layers"

FUNCTIONS = {
    "vllm.config": ["get_current_vllm_config"],
    "vllm.logger": ["init_logger"],
    f"{LAYERS}.quantization": ["register_quantization_config", "QUANTIZATION_METHODS"],
    f"{LAYERS}.fused_moe": ["FusedMoEConfig", "FusedMoEMethodBase", "RoutedExperts"],
    "vllm.platforms": ["current_platform"],
    "vllm.model_executor.model_loader.weight_utils": [
        "filter_duplicate_safetensors_files",
        "safetensors_weights_iterator",
        "get_quant_config",
    ],
}
"""Names that have to be there, with the signatures of those that are functions."""

METHODS = {
    (f"{LAYERS}.quantization.base_config", "QuantizationConfig"): [
        "get_name", "get_supported_act_dtypes", "get_min_capability", "get_config_filenames", "from_config",
        "get_quant_method", "maybe_update_config", "apply_vllm_mapper", "override_quantization_method",
    ],
    (f"{LAYERS}.quantization.base_config", "QuantizeMethodBase"): [
        "create_weights", "apply", "process_weights_after_loading",
    ],
    (f"{LAYERS}.fused_moe.fused_moe_method_base", "FusedMoEMethodBase"): [
        "__init__", "create_weights", "process_weights_after_loading", "get_fused_moe_quant_config", "apply",
    ],
    (f"{LAYERS}.linear", "UnquantizedLinearMethod"): ["create_weights", "process_weights_after_loading", "apply"],
    (f"{LAYERS}.linear", "LinearBase"): ["__init__"],
    (f"{LAYERS}.quantization.compressed_tensors.compressed_tensors", "CompressedTensorsConfig"): [
        "from_config", "get_quant_method",
    ],
    ("vllm.model_executor.parameter", "BasevLLMParameter"): ["__init__"],
    ("vllm.model_executor.parameter", "PackedvLLMParameter"): ["__init__"],
    ("vllm.model_executor.parameter", "GroupQuantScaleParameter"): [],
    ("vllm.model_executor.models.utils", "WeightsMapper"): ["apply_dict"],
    (f"{LAYERS}.fused_moe.expert_map_manager", "ExpertMapManager"): ["map_global_to_local"],
}  # fmt: skip
"""Methods that are overridden or called."""

FIELDS = {
    (f"{LAYERS}.fused_moe.routed_experts", "RoutedExperts"): [
        "activation", "apply_router_weight_on_input", "expert_map", "expert_map_manager", "global_num_experts",
        "moe_config",
    ],
    (f"{LAYERS}.fused_moe.config", "FusedMoEConfig"): [
        "activation", "experts_per_token", "has_bias", "intermediate_pad", "intermediate_size", "is_lora_enabled",
        "moe_parallel_config", "swiglu_alpha", "swiglu_beta", "swiglu_limit",
    ],
    (f"{LAYERS}.fused_moe.expert_map_manager", "ExpertMapManager"): ["num_fused_shared_experts"],
    (f"{LAYERS}.fused_moe.config", "FusedMoEParallelConfig"): [
        "all2all_backend", "dp_size", "tp_rank", "use_ep",
    ],
    ("vllm.config.vllm", "VllmConfig"): [
        "load_config", "lora_config", "offload_config", "parallel_config", "weight_transfer_config",
    ],
    ("vllm.config.parallel", "ParallelConfig"): ["enable_eplb"],
    ("vllm.config.offload", "OffloadConfig"): ["prefetch", "uva"],
    ("vllm.config.offload", "PrefetchOffloadConfig"): ["offload_group_size"],
    ("vllm.config.offload", "UVAOffloadConfig"): ["cpu_offload_gb"],
    ("vllm.config.load", "LoadConfig"): ["download_dir", "load_format"],
    ("vllm.config.model", "ModelConfig"): ["dtype", "enforce_eager", "model", "revision"],
}  # fmt: skip
"""Attributes that are read."""

ARGUMENTS = {
    f"{LAYERS}.fused_moe.layer": "FusedMoEFactory",
    f"{LAYERS}.fused_moe.routed_experts": "RoutedExperts",
    f"{LAYERS}.fused_moe.config": "FusedMoEConfig",
}
"""What makes a layer of experts: all of its arguments, or the fields of a dataclass."""

Read = Callable[[str], str | None]


def reader(place: Path) -> Read:
    """Return what gives the text of ``vllm/…`` in a wheel or below a folder, or None where it has no such file."""
    if place.is_dir():
        return lambda name: (place / name).read_text() if (place / name).is_file() else None
    archive = zipfile.ZipFile(place)
    names = set(archive.namelist())
    return lambda name: archive.read(name).decode() if name in names else None


def module(read: Read, name: str) -> ast.Module:
    path = name.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        text = read(candidate)
        if text is not None:
            return ast.parse(text)
    raise LookupError(f"no module {name}")


def definition(read: Read, where: str, name: str) -> str:
    """Return a function's signature, or what a name is."""
    for node in ast.walk(module(read, where)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return signature(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return "class"
        if isinstance(node, ast.ImportFrom) and any((it.asname or it.name) == name for it in node.names):
            return "imported"
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(it, ast.Name) and it.id == name for it in targets):
            return "value"
    if re.search(rf'"{name}"', ast.unparse(module(read, where))) or f"'{name}'" in ast.unparse(module(read, where)):
        return "on demand"
    raise LookupError(f"no {name} in {where}")


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the parameters, with their kinds and defaults but without types."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(node.args)})"


def class_of(read: Read, where: str, name: str) -> ast.ClassDef:
    for node in ast.walk(module(read, where)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"no class {name} in {where}")


def fields(node: ast.ClassDef) -> set[str]:
    """Return names that a class declares, sets on ``self``, or computes as properties."""
    found: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.add(child.target.id)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            found.add(child.attr)
        elif isinstance(child, ast.FunctionDef) and child.decorator_list:
            found.add(child.name)
        elif isinstance(child, ast.Call) and getattr(child.func, "attr", "") == "register_buffer":
            found.add(ast.literal_eval(child.args[0]))
    return found


def arguments(read: Read, where: str, name: str) -> list[str]:
    """Return the names of a function's, a constructor's or a dataclass's arguments."""
    for node in ast.walk(module(read, where)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            declared = [it.target.id for it in node.body
                        if isinstance(it, ast.AnnAssign) and isinstance(it.target, ast.Name)]  # fmt: skip
            made = [it for it in node.body if isinstance(it, ast.FunctionDef) and it.name == "__init__"]
            return declared + [it.arg for method in made for it in method.args.args + method.args.kwonlyargs][1:]
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [it.arg for it in node.args.args + node.args.kwonlyargs]
    raise LookupError(f"no {name} in {where}")


def used(read: Read) -> dict[str, Any]:
    """Return everything of one version; a method that a class inherits or has no more is null."""
    table: dict[str, Any] = {}
    for where, names in FUNCTIONS.items():
        for name in names:
            table[f"{where}:{name}"] = definition(read, where, name)
    for (where, name), methods in METHODS.items():
        node = class_of(read, where, name)
        own = {it.name: signature(it) for it in node.body if isinstance(it, ast.FunctionDef)}
        table[f"{where}:{name}"] = {method: own.get(method) for method in methods}
    for (where, name), names in FIELDS.items():
        table[f"{where}:{name}.fields"] = sorted(fields(class_of(read, where, name)) & set(names))
    for where, name in ARGUMENTS.items():
        table[f"{where}:{name}.arguments"] = sorted(arguments(read, where, name))
    return table


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for argument in sys.argv[1:]:
        match = re.search(r"-(\d+\.\d+)\.", Path(argument).name)
        if match is None:
            raise SystemExit(f"{argument}: expected a wheel")
        table[match.group(1)] = used(reader(Path(argument)))
    TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()

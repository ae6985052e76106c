"""What this project uses of transformers, read from the sources of an installed version; nothing is imported.

To renew the table, or to add a version to it (with `make transformers`, which installs them):

    python -m tests.compat.hooks build/transformers/* .venv/lib/python3.11/site-packages
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.compat.signatures import Read, class_of, definition, reader, signature

TABLE = Path(__file__).with_name("transformers.json")
LOADING = "transformers.core_model_loading"

FUNCTIONS = {
    "transformers.activations": ["ACT2FN"],
    "transformers.conversion_mapping": ["get_model_conversion_mapping"],
    LOADING: ["ConversionOps", "WeightConverter", "WeightRenaming", "rename_source_key", "revert_weight_conversion"],
    "transformers.integrations.moe": ["use_experts_implementation", "_default_apply_gate"],
    "transformers.quantizers.auto": [
        "AUTO_QUANTIZATION_CONFIG_MAPPING", "register_quantization_config", "register_quantizer",
    ],
    "transformers.utils.quantization_config": ["QuantizationConfigMixin"],
}  # fmt: skip
"""Names that have to be there, with the signatures of those that are functions."""

METHODS = {
    ("transformers.quantizers.base", "HfQuantizer"): [
        "__init__", "validate_environment", "update_attn_implementation", "preprocess_model",
        "_process_model_before_weight_loading", "update_weight_conversions", "_process_model_after_weight_loading",
        "is_serializable", "is_trainable",
    ],
    (LOADING, "WeightConverter"): ["__init__"],
    ("transformers.modeling_utils", "PreTrainedModel"): ["_get_dtype_plan", "get_input_embeddings"],
}  # fmt: skip
"""Methods that are overridden or called."""

CALLS = {
    "transformers.quantizers.auto": ["validate_environment", "update_attn_implementation"],
    "transformers.conversion_mapping": ["update_weight_conversions"],
    "transformers.modeling_utils": ["preprocess_model"],
}
"""Where transformers calls which hooks; how it does is in the table."""


def calls(read: Read, where: str, name: str) -> list[str]:
    """Return the arguments of every call of a method in a module."""
    text = read(f"{where.replace('.', '/')}.py")
    nodes = ast.walk(ast.parse(text or ""))
    found = [it for it in nodes if isinstance(it, ast.Call) and getattr(it.func, "attr", "") == name]
    return sorted({", ".join(map(ast.unparse, (*it.args, *it.keywords))) for it in found})


def used(read: Read) -> dict[str, Any]:
    """Return everything of one version; a method that a class inherits or has no more is null."""
    table: dict[str, Any] = {}
    for where, names in FUNCTIONS.items():
        for name in names:
            table[f"{where}:{name}"] = definition(read, where, name)
    for (where, name), methods in METHODS.items():
        nodes = class_of(read, where, name).body
        own = {it.name: signature(it) for it in nodes if isinstance(it, ast.FunctionDef)}
        table[f"{where}:{name}"] = {method: own.get(method) for method in methods}
    for where, names in CALLS.items():
        table[f"{where}.calls"] = {name: calls(read, where, name) for name in names}
    return table


def version_of(read: Read) -> str:
    """Return the version as 5.24."""
    found = re.search(r'^__version__ = "(\d+\.\d+)\.', read("transformers/__init__.py") or "", re.MULTILINE)
    if found is None:
        raise SystemExit("expected a folder or a wheel with transformers")
    return found[1]


def main() -> None:
    """Write the table."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for argument in sys.argv[1:]:
        read = reader(Path(argument))
        table[version_of(read)] = used(read)
    TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()

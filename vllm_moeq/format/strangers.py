"""Files and keys that another reader might take instead of what was checked.

vLLM and transformers choose among several weights and configs by their names. A checkpoint holds one of each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vllm_moeq.format.errors import CheckpointError, ConfigError

FILES = (
    "*.safetensors", "*.index.json", "*.index.*.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.npz", "*.pkl", "*.pickle", "*.tensors", "*.py",
    "params.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json",
    "config.*.json", "modules.json", "sentence_*_config.json", "tokenizer.*.json",
)  # fmt: skip
"""Names of weights, of configs that readers prefer or add to config.json, and of code. Shards and their index are no
strangers."""

WHOLE = "model.safetensors"
"""The file that readers prefer to an index. It may be the only shard of one: then both say the same."""

OF_NO_SHARD = (WHOLE, "consolidated*", ".*")
"""Names that not even a shard in the index may have: transformers or vLLM would take such a shard alone, or leave it
out."""

KEYS = (
    "auto_map", "configuration_files", "transformers_weights", "compression_config", "speculators_config",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "_auto_class", "attribute_map", "base_config_key",
    "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "default_rope_type",
    "fusion_config", "has_no_defaults_at_init", "ignore_keys_at_rope_validation", "keys_to_ignore_at_inference",
    "sub_configs", "llm_config", "text_encoder", "decoder", "generator",
)  # fmt: skip
"""Keys of config.json, in any of its objects, that name code, a kernel on the Hub, other weights or other configs, that
take the place of an attribute of transformers' config classes (``attribute_map`` gives any key another name), or whose
object readers would take for the language model's config."""

METHODS = (
    "_check_received_keys", "_decode_special_floats", "_dict_from_json_file", "_encode_special_floats",
    "_get_config_dict", "_get_files_timestamps", "_get_generation_parameters",
    "_getattr_without_heterogeneous_validation", "_hasattr_without_heterogeneous_validation",
    "_iter_config_keys_with_heterogeneous_adjustment", "_remove_keys_not_serialized",
    "_update_heterogeneous_to_dict_output", "_upload_modified_files", "_validate_axial_rope_parameters",
    "_validate_default_rope_parameters", "_validate_dynamic_rope_parameters",
    "_validate_linear_rope_parameters", "_validate_llama3_rope_parameters",
    "_validate_longrope_rope_parameters", "_validate_proportional_rope_parameters",
    "_validate_yarn_rope_parameters", "convert_rope_params_to_dict", "dict_dtype_to_str", "from_dict",
    "from_json_file", "from_pretrained", "get_config_dict", "get_mtp_config", "get_text_config",
    "is_custom_code", "is_remote_code", "nested_rope_parameter_keys", "push_to_hub", "register_for_auto_class",
    "save_pretrained", "standardize_rope_params", "to_dict", "to_diff_dict", "to_json_file", "to_json_string",
    "update", "update_from_string", "validate", "validate_architecture", "validate_layer_type",
    "validate_output_attentions", "validate_rope", "validate_token_ids",
)  # fmt: skip
"""Methods of transformers' config classes, whose place a key would take; a special name, ``__init__``, would too."""

QUANTIZATION = "quantization_config"

NOT_ALONE = {
    "transformers_weights": "this checkpoint needs `import vllm_moeq.hf` before from_pretrained, or the command "
    "`moeq lm-eval` (package vllm-moeq)"
}
"""The one value that each of these keys may have, at the top of config.json: the name of no file.

Transformers only warns of a method that it does not know, and gives the experts random weights. With this name of the
weights it stops, and shows it. Our quantizer takes the key away.
"""


def refuse_files(folder: Path, ours: Collection[str]) -> None:
    """Refuse files that a reader might take instead of the shards or of config.json.

    Args:
        folder: the checkpoint.
        ours: names of its shards and their index.

    Raises:
        CheckpointError: naming the first such file.
    """
    for name in sorted(path.name for path in folder.iterdir()):
        if any(fnmatchcase(name.lower(), pattern) for pattern in _refused(name, ours)):
            raise CheckpointError(
                f"{folder / name}: expected no such file beside {next(iter(ours))}: a reader might prefer it"
            )
    for path in _in_folders(folder):
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in FILES):
            raise CheckpointError(f"{path}: expected no weights, configs or code in a folder within a checkpoint")


def _in_folders(folder: Path) -> Iterator[Path]:
    """Yield the files of the folders in a checkpoint, but of hidden ones, which tools keep beside what they load."""
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            yield from sorted(inner.iterdir())


def _refused(name: str, ours: Collection[str]) -> tuple[str, ...]:
    """Return the patterns that a name may not match."""
    if name not in ours:
        return FILES
    alone = len(ours) == 1 or (name == WHOLE and len(ours) == 2)
    return () if alone else OF_NO_SHARD


def refuse_keys(config: Mapping[str, Any], path: Path) -> None:
    """Refuse keys that lead a reader to code, to other weights or to another config.

    Args:
        config: contents of config.json.
        path: config.json, for messages.

    Raises:
        ConfigError: naming the first such key.
    """
    for place, key, value in keys_within(config):
        if place in NOT_ALONE and value == NOT_ALONE[place]:
            continue
        if key in METHODS or key.startswith("__"):
            raise ConfigError(f"{path}: {place}: expected no such key, found the name of a method")
        if key in KEYS or (key == QUANTIZATION and place != QUANTIZATION):
            raise ConfigError(f"{path}: {place}: expected no such key in a checkpoint, found {value!r:.80}")


def without_strangers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the keys of :data:`KEYS` and :data:`METHODS`."""
    return {key: _clean(value) for key, value in config.items() if key not in (*KEYS, *METHODS)}


def _clean(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _clean(child) for key, child in value.items() if key not in (*KEYS, *METHODS, QUANTIZATION)}


def keys_within(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted place, key, value) of all objects within objects, but not inside our own configuration."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while waiting:
        above, part = waiting.pop()
        for key, value in part.items():
            place = f"{above}.{key!s:.80}".removeprefix(".")
            yield place, key, value
            if isinstance(value, Mapping) and place != QUANTIZATION:
                waiting.append((place, value))

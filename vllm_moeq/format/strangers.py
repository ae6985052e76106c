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
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
    "*.onnx_data", "*.npz", "*.pkl", "*.pickle", "*.tensors", "*.py",
    "params.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json",
    "config.*.json", "modules.json", "sentence_*_config.json",
)  # fmt: skip
"""Names of weights, of configs that readers prefer or add to config.json, and of code. Shards and their index are no
strangers."""

KEYS = (
    "auto_map", "configuration_files", "transformers_weights", "compression_config", "speculators_config",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip
"""Keys of config.json, in any of its objects, that name code, a kernel on the Hub, other weights or other configs."""

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
        if name not in ours and any(fnmatchcase(name.lower(), pattern) for pattern in FILES):
            raise CheckpointError(
                f"{folder / name}: expected no such file beside {next(iter(ours))}: a reader might prefer it"
            )


def refuse_keys(config: Mapping[str, Any], path: Path) -> None:
    """Refuse keys that lead a reader to code, to other weights or to another config.

    Args:
        config: contents of config.json.
        path: config.json, for messages.

    Raises:
        ConfigError: naming the first such key.
    """
    for place, key, value in _keys(config):
        if place in NOT_ALONE and value == NOT_ALONE[place]:
            continue
        if key in KEYS or (key == QUANTIZATION and place != QUANTIZATION):
            raise ConfigError(f"{path}: {place}: expected no such key in a checkpoint, found {value!r:.80}")


def without_strangers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the keys of :data:`KEYS`."""
    return {key: _clean(value) for key, value in config.items() if key not in KEYS}


def _clean(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _clean(child) for key, child in value.items() if key not in (*KEYS, QUANTIZATION)}


def _keys(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted place, key, value) of all objects within objects, but not inside our own configuration."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while waiting:
        above, part = waiting.pop()
        for key, value in part.items():
            place = f"{above}.{key!s:.80}".removeprefix(".")
            yield place, key, value
            if isinstance(value, Mapping) and place != QUANTIZATION:
                waiting.append((place, value))

"""What a folder says of its encoded weights: ``quantization_config``, or the file in which older tools put it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.format import NESTED, ConfigError, read_json
from vllm_moeq.format.files import check_inside

CONFIG = "config.json"

MAX_BLOCK = 1 << 16
"""The most rows or columns that may share a scale in a block."""

MAX_GROUPS = 1024
"""The most ``config_groups`` that are read."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""``dtype`` in config.json → dtype of decoded weights; bfloat16 for any other."""

SAME_FILES = {
    ("auto-round", "auto_round:auto_gptq"): "gptq",
    ("auto-round", "auto_round:auto_awq"): "awq",
}
"""``quant_method`` and ``packing_format`` → the method that has the same files."""


@dataclass(frozen=True)
class Settings:
    """The settings of an encoded source.

    Attributes:
        path: the file that has them, for messages.
        method: ``quant_method``.
        dtype: dtype of decoded weights.
        options: the contents; not checked.
    """

    path: Path
    method: str
    dtype: torch.dtype = torch.bfloat16
    options: Mapping[str, Any] = field(default_factory=dict)

    def refuse(self, key: str, expected: str) -> ConfigError:
        """Return the error for an option that cannot be used."""
        return ConfigError(f"{self.path}: {key}: expected {expected}, found {self.options.get(key)!r:.80}")

    def weights(self) -> Iterator[Mapping[str, Any]]:
        """Yield what compressed-tensors says of the weights of each of its groups of modules."""
        groups = self.options.get("config_groups")
        for group in list(groups.values())[:MAX_GROUPS] if isinstance(groups, Mapping) else ():
            found = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(found, Mapping):
                yield found

    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Return the sizes of blocks, in rows and columns, that may share a scale.

        Raises:
            ConfigError: a size that no block has.
        """
        found = []
        named = [("weight_block_size", self.options.get("weight_block_size"))]
        named += [("block_structure", group.get("block_structure")) for group in self.weights()]
        for key, value in named:
            if value is None:
                continue
            sizes = isinstance(value, list) and [size for size in value if type(size) is int and 0 < size <= MAX_BLOCK]
            if not sizes or len(sizes) != 2 or len(value) != 2:
                raise ConfigError(f"{self.path}: {key}: expected two numbers up to {MAX_BLOCK}, found {value!r:.80}")
            found.append((sizes[0], sizes[1]))
        return tuple(dict.fromkeys(found))


def read_settings(folder: Path, config: Mapping[str, Any]) -> Settings | None:
    """Return the settings of a source, or None if nothing says that it is encoded.

    A wrapper's config has them at its top or in its language model's; config.json counts before other files.

    Raises:
        ConfigError: they are no object, or name no method.
    """
    text = config.get(NESTED)
    places = ((config, ""), (text if isinstance(text, Mapping) else {}, f"{NESTED}."))
    dtype = next((DTYPES[name] for part, _ in places for name in _dtypes(part)), torch.bfloat16)
    for part, prefix in places:
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                return _settings(folder / CONFIG, f"{prefix}{key}", part[key], dtype)
    for file, unpack in FILES.items():
        path = folder / file
        if path.exists():
            check_inside(path, folder)
            return _settings(path, "", unpack(read_json(path)), dtype)
    return None


def _dtypes(part: Mapping[str, Any]) -> Iterator[str]:
    for key in ("dtype", "torch_dtype"):
        if isinstance(part.get(key), str) and part[key] in DTYPES:
            yield part[key]


def _settings(path: Path, key: str, found: Any, dtype: torch.dtype) -> Settings:
    place = f"{path}: {key}: " if key else f"{path}: "
    if not isinstance(found, Mapping):
        raise ConfigError(f"{place}expected an object, found {found!r:.80}")
    method = found.get("quant_method")
    if not isinstance(method, str):
        raise ConfigError(f"{place}quant_method: expected the name of a method, found {method!r:.80}")
    packing = found.get("packing_format")
    same = SAME_FILES.get((method, packing)) if isinstance(packing, str) else None
    return Settings(path, same or method, dtype, found)


def _of_modelopt(found: Any) -> Any:
    """Return modelopt's own file as config.json has it."""
    inner = found.get("quantization") if isinstance(found, Mapping) else None
    return {**inner, "quant_method": "modelopt"} if isinstance(inner, Mapping) else found


def _of_gptq(found: Any) -> Any:
    """Return AutoGPTQ's own file as config.json has it; other tools gave the name to a file of theirs."""
    if not isinstance(found, Mapping):
        return found
    return {**found, "quant_method": "awq" if found.get("quant_method") == "awq" else "gptq"}


def _of_awq(found: Any) -> Any:
    return {**found, "quant_method": "awq"} if isinstance(found, Mapping) else found


FILES = {"hf_quant_config.json": _of_modelopt, "quantize_config.json": _of_gptq, "quant_config.json": _of_awq}
"""File beside config.json → how its contents become those of a ``quantization_config``."""

"""A part of each head that is rotated: vLLM reads it for every model, transformers for those that have it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_moeq.format import ConfigError

PARTIAL = "partial_rotary_factor"
ROPE_TYPE = "rope_type"
DEFAULT = "default"


def check_partial(config: Mapping[str, Any], classes: tuple[type, type], path: Path) -> None:
    """Refuse a part that vLLM would rotate and transformers' class would not.

    Scaled embeddings (yarn and others) take the key in every model. Plain ones do so where the model's code names it.

    Args:
        config: contents of config.json.
        classes: transformers' classes of the config and of the model.
        path: config.json, for messages.

    Raises:
        ConfigError: naming the key.
    """
    value = _plain_part(config)
    if value is None or value == 1:
        return
    sources = (sys.modules[one.__module__].__file__ for one in classes)
    if not any(PARTIAL in Path(source).read_text() for source in sources if source is not None):
        raise ConfigError(
            f"{path}: {PARTIAL}: expected no such key, which {classes[1].__name__} has not, found {value!r:.40}"
        )


def _plain_part(value: Any) -> Any:
    """Return the first part of a plain embedding in a config and its objects, or None."""
    if not isinstance(value, Mapping):
        return None
    scaled = value.get(ROPE_TYPE, value.get("type", DEFAULT)) != DEFAULT
    if value.get(PARTIAL) is not None and not scaled:
        return value[PARTIAL]
    return next((found for child in value.values() if (found := _plain_part(child)) is not None), None)

"""config.json of a checkpoint without its layers for speculative decoding, which quantizing leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.model.layout import COUNTS


def without_speculation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that announces no layers for speculative decoding, at the top or in any of its parts.

    The counts become 0 instead of being removed, because some models take 1 for a missing one.

    Args:
        config: the source's config.json.
    """
    return {key: 0 if key in COUNTS and value is not None else _inside(value) for key, value in config.items()}


def _inside(value: Any) -> Any:
    return without_speculation(value) if isinstance(value, Mapping) else value

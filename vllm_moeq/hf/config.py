"""Transformers' view of a checkpoint's ``quantization_config``."""

from __future__ import annotations

import json
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_moeq.format import QUANT_METHOD, parse_config


class MoeqQuantizationConfig(QuantizationConfigMixin):
    """A validated ``quantization_config`` (docs/format.md).

    Args:
        data: the keys of the object in config.json.

    Raises:
        ConfigError: the object violates the format.
    """

    def __init__(self, **data: Any) -> None:
        # Transformers and its users read quant_method; ``moeq`` holds the whole configuration.
        self.quant_method = QUANT_METHOD
        self.moeq = parse_config({"quant_method": QUANT_METHOD, **data}, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """Return the object as in config.json."""
        result: dict[str, Any] = json.loads(self.moeq.model_dump_json(exclude_none=True))
        return result

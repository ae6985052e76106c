"""Transformers' view of a checkpoint's ``quantization_config``."""

from __future__ import annotations

import json
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_moeq.format import QUANT_METHOD, parse_config


class MoeqQuantizationConfig(QuantizationConfigMixin):
    """The keys of docs/format.md, validated.

    Args:
        data: the object in config.json, key by key.

    Raises:
        ConfigError: a violation of the format.
    """

    def __init__(self, **data: Any) -> None:
        # What transformers and its users look at; the attribute ``moeq`` holds everything.
        self.quant_method = QUANT_METHOD
        self.moeq = parse_config({"quant_method": QUANT_METHOD, **data}, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """Return the object as config.json has it."""
        result: dict[str, Any] = json.loads(self.moeq.model_dump_json(exclude_none=True))
        return result

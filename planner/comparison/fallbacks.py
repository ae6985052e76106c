"""Count the experts of a candidate that a quantizer with calibration could not calibrate."""

from __future__ import annotations

from pathlib import Path

from vllm_moeq.format import load_config, read_json

INDEX = "model.safetensors.index.json"
KEY = "fallbacks"
"""Key of the count in the metadata of the index that :mod:`planner.comparison.slim` writes."""


def count_fallbacks(folder: Path) -> int:
    """Return how many experts of a folder were quantized without calibration although it was asked for.

    Args:
        folder: a checkpoint that moeq wrote, or the dequantized experts of Slim-LLM.

    Raises:
        MoeqError: a damaged folder.
    """
    if (folder / "config.json").is_file():
        return sum(len(experts) for experts in (load_config(folder).plan.fallback or {}).values())
    return int(read_json(folder / INDEX)["metadata"][KEY])

"""Find a model's architecture: its row of the table, or what transformers' class says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.model.architectures import ARCHITECTURES, Architecture
from planner.model.structure import read_structure
from vllm_moeq.completeness import meta_model, no_class, silence
from vllm_moeq.format import MoeqError, UsageError

CONFIG = "config.json"


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture of a config.json; None for a model that is not known here."""
    row = _row(config)
    if row is not None:
        return row
    found = _recognized(config, Path(CONFIG))
    return found if isinstance(found, Architecture) else None


def architecture_for(config: Mapping[str, Any], folder: Path, tensors: Iterable[str]) -> Architecture:
    """Return the architecture of a model.

    Raises:
        UsageError: a ``model_type`` without a row, and transformers' class does not fit; the message says why not, and
            names tensors that look like experts.
    """
    row = _row(config)
    if row is not None:
        return row
    found = _recognized(config, folder / CONFIG)
    if isinstance(found, Architecture):
        return found
    looks = sorted({re.sub(r"(?<=[._])\d+(?=\.)", "N", name) for name in tensors if "expert" in name.lower()})
    kind = f"{folder / CONFIG}: model_type {config.get('model_type')!r:.80}"
    if not looks:
        raise UsageError(f"{kind}: expected a model with routed experts: {found}")
    raise UsageError(
        f"{kind} cannot be read: it has no row in the table, and {found}; tensors that look like experts: "
        f"{', '.join(looks[:6])}"
    )


def why_unserved(config: Mapping[str, Any]) -> str | None:
    """Return the reason why vLLM cannot serve the quantized model of a config.json, or None.

    A row says what holds for all models of its type. What this one's experts compute, transformers' class says.
    """
    row = _row(config)
    if row is not None and row.unserved is not None:
        return row.unserved
    found = _recognized(config, Path(CONFIG))
    return found.unserved if isinstance(found, Architecture) else None


def _row(config: Mapping[str, Any]) -> Architecture | None:
    model_type = config.get("model_type")
    return ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None


def _recognized(config: Mapping[str, Any], path: Path) -> Architecture | str:
    """Return what transformers' class says of a model, or the reason why it says nothing."""
    found = _read(json.dumps(config, sort_keys=True))
    return found.replace(CONFIG, str(path), 1) if isinstance(found, str) and found.startswith(CONFIG) else found


@lru_cache(maxsize=4)
def _read(text: str) -> Architecture | str:
    """Return the same of a config.json as text: building the class takes a second, and every part of a run asks."""
    config = json.loads(text)
    reason = no_class(config)
    if reason is not None:
        return reason
    try:
        model = meta_model(config, Path(CONFIG))
        with silence():
            return read_structure(model, str(config["model_type"]), CONFIG)
    except MoeqError as error:
        return str(error)

"""Layers for speculative decoding (MTP): a checkpoint leaves them out, or keeps them in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from planner.model.layout import Layout, is_plain
from planner.model.recognize import why_unserved
from planner.model.source import SourceModel
from vllm_moeq.format import UsageError
from vllm_moeq.format.speculation import COUNTS, SPECULATIVE, announced, count_layers, first_gap, is_speculative

Mtp = Literal["drop", "keep"]
"""What becomes of layers for speculative decoding."""


def with_speculation(model: SourceModel, layout: Layout) -> Layout:
    """Return a layout that keeps the layers for speculative decoding as they are, instead of leaving them out.

    Raises:
        UsageError: the model has none that config.json announces, one lacks a tensor, or vLLM cannot serve it.
    """
    config, where = model.config, f"{model.folder / 'config.json'}"
    if (reason := why_unserved(config)) is not None:
        raise UsageError(f"--mtp keep: expected a model that vLLM serves, found one that it does not: {reason}")
    more, layers = announced(config), len(layout.blocks)
    kept = tuple(name for name in layout.left_out if is_speculative(name, layers, more))
    own_stack = any(name.startswith(SPECULATIVE) for name in kept)
    if not kept or (count_layers(kept) < more and not own_stack):
        raise UsageError(
            f"--mtp keep: expected layers for speculative decoding that {where} announces ({' or '.join(COUNTS)}), "
            f"found {more} announced, and tensors of {count_layers(kept)}"
        )
    if (gap := first_gap(kept, max(layer.num_experts for layer in layout.layers))) is not None:
        raise UsageError(f"--mtp keep: {model.folder}: expected {gap}, found none; --mtp drop leaves the layer out")
    rest = tuple(name for name in layout.left_out if name not in set(kept))
    plain = [name for name in kept if is_plain(name, model.shards.info(name))]
    return replace(
        layout,
        kept=tuple(sorted((*layout.kept, *kept))),
        plain=tuple(sorted((*layout.plain, *plain))),
        left_out=rest,
        speculative=kept,
    )


def without_speculation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that announces no layers for speculative decoding, at the top or in any of its parts.

    The counts become 0 instead of being removed, because some models take 1 for a missing one.

    Args:
        config: the source's config.json.
    """
    return {key: 0 if key in COUNTS and value is not None else _inside(value) for key, value in config.items()}


def _inside(value: Any) -> Any:
    return without_speculation(value) if isinstance(value, Mapping) else value

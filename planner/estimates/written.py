"""Estimate the bytes of the files that quantizing writes. Tensors are exact, headers and JSON files approximate."""

from __future__ import annotations

from collections.abc import Iterator

from planner.model.hub import companion_bytes
from planner.model.layout import Layout
from planner.model.sizes import GRIDS, Sizes, Storage
from planner.model.source import SourceModel
from vllm_moeq.format import LINEAR_SUFFIXES, SCHEMES, Linear

HEADER_ENTRY = 72
"""Bytes of a tensor's entry in a shard's header without its name: dtype, shape, offsets."""

INDEX_ENTRY = 46
"""Bytes of a tensor's entry in the index without its name: the shard's name, indentation."""

EXPERT_ENTRIES = 260
"""Bytes per expert in config.json, plan.json and quantization_report.json together."""

WIDTH_ENTRY = 16
"""Bytes of a linear's width without its name, in config.json and in quantization_report.json."""

FIXED = 8192
"""Bytes of config.json, plan.json, the report and the model card without their entries for experts."""


def quantized_bytes(model: SourceModel, layout: Layout, sizes: Sizes, linear: Linear, storage: Storage = GRIDS) -> int:
    """Return the bytes of a quantized folder.

    Args:
        model: the source; its tokenizer and similar files are copied.
        layout: the source's layout.
        sizes: sizes of the output's tensors.
        linear: format of the linears that are not experts.
        storage: how the experts are stored.
    """
    entries = sum(2 * (len(name) + WIDTH_ENTRY) for name in linear.widths)
    entries += sum(2 * len(name) + HEADER_ENTRY + INDEX_ENTRY for name in _names(layout, linear, storage))
    copied = companion_bytes(model.folder)
    return sizes.total_bytes + entries + copied + EXPERT_ENTRIES * layout.num_experts + FIXED


def _names(layout: Layout, linear: Linear, storage: Storage) -> Iterator[str]:
    """Yield the names of the output's tensors."""
    for layer in layout.layers:
        for expert in range(layer.num_experts):
            scheme = SCHEMES[storage.chosen[layer.prefix][expert]] if layer.prefix in storage.chosen else storage.scheme
            for projection in layer.projections.names():
                for suffix in scheme.suffixes:
                    yield f"{layer.prefix}.{expert}.{projection}.{suffix}"
    for name in layout.linears:
        base = name.removesuffix(".weight")
        yield from (name,) if linear.bits_of(name) == 16 else (f"{base}.{suffix}" for suffix in LINEAR_SUFFIXES)
    yield from layout.kept

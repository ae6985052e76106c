"""Refuse a source that lacks tensors of its architecture, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from planner.model.companions import check_companions
from planner.model.layout import Layout, architecture_of, read_layout
from planner.model.quantized import is_moeq
from planner.model.recognize import find_architecture
from planner.model.skeleton import ConfigModel, SkeletonTensors
from planner.model.source import CONFIG, SourceModel
from planner.model.tensors import SourceTensors
from vllm_moeq.completeness import (
    Expected,
    check_tied,
    check_top_k,
    compare,
    expected_tensors,
    no_class,
    refuse_bytes,
    verify_whole,
)
from vllm_moeq.format import Summary, read_config_json
from vllm_moeq.format.speculation import announced


def check_folder(folder: Path) -> str | None:
    """Check a model's folder as :func:`check_whole` does, whether moeq wrote it or not.

    Returns:
        The reason why not everything was compared; None if it was, or for a model that has no experts known here.

    Raises:
        MoeqError: naming the first tensor that is missing, misshapen or too much.
    """
    config = read_config_json(folder / CONFIG)
    if is_moeq(config):
        return check_checkpoint(folder, values=False).only_experts
    if not isinstance(config, dict) or find_architecture(config) is None:
        return None
    with SourceModel(folder) as model:
        return check_whole(model, read_layout(model))


def check_checkpoint(folder: Path, *, values: bool = True) -> Summary:
    """Check a moeq checkpoint as :func:`vllm_moeq.completeness.verify_whole` does, and the files beside its weights.

    Raises:
        MoeqError: naming the file, and the tensor if it is one.
    """
    check_companions(folder)
    return verify_whole(folder, values=values)


def check_whole(model: SourceModel, layout: Layout) -> str | None:
    """Compare names and shapes of a source's tensors with what its architecture's class has.

    Returns:
        The reason why there is no class, so that only experts were checked; None if everything was compared.

    Raises:
        MoeqError: naming the first tensor that is missing, misshapen or too much, or a damaged file beside them.
    """
    if isinstance(model, ConfigModel):
        return None
    check_companions(model.folder)
    check_top_k(model.config, model.folder / CONFIG)
    reason = no_class(model.config)
    if reason is not None:
        refuse_bytes(model.shards, set(model.shards.tensors).difference(layout.left_out))
    else:
        whole = expected_source(model)
        compare(model.shards, whole, model.shards.tensors, besides=frozenset(_announced(model, layout)))
        check_tied(model.shards, whole)
    return reason


def expected_source(model: SourceModel) -> Expected:
    """Return what a source's class has, with one matrix per expert and projection, as :class:`SourceTensors` shows it.

    Raises:
        ConfigError: see :func:`vllm_moeq.completeness.expected_tensors`.
    """
    expected = expected_tensors(model.config, model.folder / CONFIG)
    decoded = SourceTensors(model.folder, model.config, SkeletonTensors(model.folder, expected.tensors), decode=False)
    return replace(expected, tensors=decoded.tensors)


def _announced(model: SourceModel, layout: Layout) -> list[str]:
    """Return the tensors that are left out and belong to layers for speculative decoding, as config.json says.

    Layers behind the last one that config.json does not announce are layers of a model that it does not describe.
    """
    row, blocks = architecture_of(model), set(layout.blocks)
    more = announced(model.config)
    found = []
    for name in layout.left_out:
        owner = row.owner(name)
        if owner is not None:
            stack = row.stacks[owner[0]].layers
            if owner[1] >= sum(block.startswith(f"{stack}.") for block in blocks) + more:
                continue
        found.append(name)
    return found

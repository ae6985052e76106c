"""Check before any work that an imported checkpoint will be whole: all tensors of its class, and values of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from planner.exchange.autogptq.layout import QWEIGHT
from planner.exchange.autogptq.read import GptqCheckpoint, Module
from planner.model.companions import check_companions
from planner.model.source import CONFIG
from planner.model.whole import expected_source
from vllm_moeq.completeness import Expected, check_tied, check_top_k, compare, no_class, refuse_bytes
from vllm_moeq.format import TensorInfo
from vllm_moeq.format.schemes import check_finite


def check_tensors(checkpoint: GptqCheckpoint) -> str | None:
    """Compare the tensors of a checkpoint with its class's; a quantized linear stands for its weight.

    Returns:
        The reason why there is no class, so that only experts were checked; None if everything was compared.

    Raises:
        MoeqError: naming the first tensor that is missing, misshapen or too much, or a damaged file beside them.
    """
    model, shards = checkpoint.model, checkpoint.model.shards
    check_companions(model.folder)
    check_top_k(model.config, model.folder / CONFIG)
    reason = no_class(model.config)
    if reason is not None:
        refuse_bytes(shards, checkpoint.others.values())
    else:
        expected = _under_their_names(expected_source(model), checkpoint)
        compare(shards, expected, _found(checkpoint))
        check_tied(shards, expected)
    return reason


def check_values(checkpoint: GptqCheckpoint, dequantized: Mapping[str, object]) -> None:
    """Check what is written as it is, or dequantized; :func:`read_gptq` has looked at the rest.

    Args:
        checkpoint: the checkpoint.
        dequantized: our names of the linears that will be dequantized.

    Raises:
        CheckpointError: naming the first tensor with NaN, infinity or a value that no model has.
    """
    shards = checkpoint.model.shards
    for name in checkpoint.others.values():
        if shards.info(name).dtype.is_floating_point:
            check_finite(shards.map(name), shards.place(name))
    for name in dequantized:
        module = checkpoint.modules[name]
        values = checkpoint.dequantize(module).to(checkpoint.dtype)
        check_finite(values, f"{shards.place(module.name(QWEIGHT))}, dequantized")


def _found(checkpoint: GptqCheckpoint) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint under the file's names, with one weight for each quantized linear."""
    found = {name: checkpoint.model.shards.info(name) for name in checkpoint.others.values()}
    for module in checkpoint.modules.values():
        info = checkpoint.model.shards.info(module.name(QWEIGHT))
        found[_weight(module)] = replace(info, shape=(module.rows, module.columns), dtype=torch.float32)
    return found


def _under_their_names(expected: Expected, checkpoint: GptqCheckpoint) -> Expected:
    """Return the tensors of a class under the names that the file uses, so that messages name those."""
    theirs = checkpoint.others | {f"{name}.weight": _weight(module) for name, module in checkpoint.modules.items()}
    return replace(
        expected,
        tensors={theirs.get(name, name): info for name, info in expected.tensors.items()},
        tied={theirs.get(name, name): theirs.get(weight, weight) for name, weight in expected.tied.items()},
    )


def _weight(module: Module) -> str:
    return f"{module.base}.weight"

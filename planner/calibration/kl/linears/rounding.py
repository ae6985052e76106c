"""The linears of a group, rounded to nearest."""

from __future__ import annotations

import torch

from planner.model.linear_groups import LinearGroup
from planner.model.source import SourceModel
from planner.quantization.quantizers import quantize_linear
from vllm_moeq.format import Linear, linear_values
from vllm_moeq.format.linears import SCALES, WORDS


def rounded_group(model: SourceModel, group: LinearGroup, spec: Linear) -> dict[str, torch.Tensor]:
    """Return name → weights float32 [N, K] of a group's linears in the format ``spec``.

    Raises:
        CheckpointError: a weight cannot be read or is not finite, or its input dimension is no multiple of the groups.
    """
    return {name: stored_values(quantize_linear(model.shards.load(name), spec), spec) for name in group.names}


def stored_values(tensors: dict[str, torch.Tensor], spec: Linear) -> torch.Tensor:
    """Return the weights [N, K] of one packed linear."""
    return linear_values(tensors[WORDS], tensors[SCALES], spec.bits)

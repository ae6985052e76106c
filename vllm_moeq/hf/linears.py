"""Packed linears outside the experts: they are dequantized while transformers loads them.

Experts are most of a model, so keeping these linears packed would save little memory. Besides, models read, tie or
transform the ``weight`` of their linears, so it has to exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from vllm_moeq.format import LINEAR_SUFFIXES, SCHEMES, SIGNS, MoeqConfig, linear_values

SOURCES = [rf"\.{suffix}$" for suffix in LINEAR_SUFFIXES]
ELSEWHERE = "moeq.experts"
"""The name to which the experts' tensors are renamed, so that transformers ignores them."""


class UnpackLinear(ConversionOps):
    """The conversion from packed words and scales to weights.

    A linear's width follows from its tensors, which were compared with the config before.

    Args:
        dtypes: the dtype of each weight, by its name in the model.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        self.dtypes = dtypes

    def __deepcopy__(self, memo: dict[int, Any]) -> UnpackLinear:
        # Transformers copies an operation for every weight; this one is immutable.
        return self

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], full_layer_name: str = "", **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return one linear's {name: weight [N, K]}; see :class:`transformers.core_model_loading.ConversionOps`."""
        words, scales, shape = (input_dict[source][0] for source in SOURCES)
        bits = words.shape[1] * 32 // int(shape[1])
        return {full_layer_name: linear_values(words, scales, bits).to(self.dtypes[full_layer_name])}


def conversions(config: MoeqConfig, dtypes: Mapping[str, torch.dtype]) -> list[Any]:
    """Return the renamings and conversions that transformers applies before its own.

    Args:
        config: the checkpoint's configuration.
        dtypes: the dtype of each parameter, by its name in the model.
    """
    suffixes = dict.fromkeys(suffix for scheme in SCHEMES.values() for suffix in scheme.suffixes)
    suffixes[SIGNS] = None
    experts = rf"^{_any(config.experts)}\.\d+\.{_any(config.projections.names())}\.{_any(suffixes)}$"
    result: list[Any] = [WeightRenaming(experts, ELSEWHERE)]
    if config.linear.bits != 16:
        unpack = UnpackLinear(dtypes)
        result.append(WeightConverter(list(SOURCES), ".weight", operations=[unpack]))
    return result


def _any(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"

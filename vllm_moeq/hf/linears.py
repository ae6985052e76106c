"""Packed linears that are no experts: transformers loads what they stand for, rounded to the model's dtype.

Experts are most of a model, so packed linears would save little memory here; and models ask their linears for a
``weight``, tie it, or compute from it in their own ways, which they can only if it is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from vllm_moeq.format import LINEAR_SUFFIXES, SCHEMES, MoeqConfig, linear_values

SOURCES = [rf"\.{suffix}$" for suffix in LINEAR_SUFFIXES]
ELSEWHERE = "moeq.experts"
"""The name under which transformers sees, and ignores, the tensors of experts."""


class UnpackLinear(ConversionOps):
    """Words and scales in, weights out.

    Args:
        bits: 4 or 8.
        dtypes: by names in the model, what each weight is rounded to.
    """

    def __init__(self, bits: int, dtypes: Mapping[str, torch.dtype]) -> None:
        self.bits = bits
        self.dtypes = dtypes

    def __deepcopy__(self, memo: dict[int, Any]) -> UnpackLinear:
        # Transformers copies an operation for every weight; this one never changes.
        return self

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], full_layer_name: str = "", **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return {name: weight [N, K]} of one linear; see :class:`transformers.core_model_loading.ConversionOps`."""
        words, scales = (input_dict[source][0] for source in SOURCES[:2])
        return {full_layer_name: linear_values(words, scales, self.bits).to(self.dtypes[full_layer_name])}


def conversions(config: MoeqConfig, dtypes: Mapping[str, torch.dtype]) -> list[Any]:
    """Return what transformers has to do before its own renamings and conversions.

    Args:
        config: the checkpoint's configuration.
        dtypes: by names in the model, the dtype of each parameter.
    """
    suffixes = dict.fromkeys(suffix for scheme in SCHEMES.values() for suffix in scheme.suffixes)
    experts = rf"^{_any(config.experts)}\.\d+\.{_any(config.projections.names())}\.{_any(suffixes)}$"
    result: list[Any] = [WeightRenaming(experts, ELSEWHERE)]
    if config.linear.bits != 16:
        unpack = UnpackLinear(config.linear.bits, dtypes)
        result.append(WeightConverter(list(SOURCES), ".weight", operations=[unpack]))
    return result


def _any(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"

"""Make the quantization_config that GPTQModel reads: one rule per layer and width, one per width of linears."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from planner.exchange.autogptq.layout import ZERO_STORAGE, Version
from planner.exchange.autogptq.names import module_name
from planner.model.architectures import Architecture
from vllm_moeq import __version__
from vllm_moeq.format import MoeqConfig

PRODUCER = f"vllm-moeq:{__version__}"


def gptq_config(config: MoeqConfig, row: Architecture, version: Version, symmetric: bool) -> dict[str, Any]:
    """Return GPTQModel's equivalent of our configuration.

    Args:
        config: our configuration, without experts of one bit.
        row: the architecture, for names.
        version: storage of zero points.
        symmetric: whether every zero point of every linear is 2^(b−1).
    """
    counts = Counter(bits for widths in config.experts.values() for bits in widths)
    base = {"bits": counts.most_common(1)[0][0], "group_size": config.group_size}
    if config.linear.bits != 16:
        base = {"bits": config.linear.bits, "group_size": config.linear.group_size}
    rules: dict[str, dict[str, int]] = {}
    routers = {row.router_name(index).removesuffix(".weight") for index in range(_layers(config))}
    plain = [name for name in config.unquantized if name not in routers and name != "lm_head"]
    if plain:
        rules[f"-:^(?:{'|'.join(re.escape(module_name(row, name)) for name in plain)})$"] = {}
    for width in sorted(set(config.linear.widths.values())):
        names = (module_name(row, name) for name, own in config.linear.widths.items() if own == width)
        rule: dict[str, int] = {"bits": width, "group_size": config.linear.group_size}
        rules[f"+:^(?:{'|'.join(map(re.escape, names))})$"] = rule
    for prefix, widths in config.experts.items():
        for bits in sorted(set(widths)):
            rule = {"bits": bits, "group_size": config.group_size}
            if rule != base:
                experts = "|".join(str(expert) for expert, width in enumerate(widths) if width == bits)
                rules[rf"+:^{re.escape(module_name(row, prefix))}\.(?:{experts})\."] = rule
    name = next(key for key, value in ZERO_STORAGE.items() if value == version)
    return {
        **base,
        "dynamic": rules,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": name,
        "pack_dtype": "int32",
        "meta": {"quantizer": [PRODUCER]},
    }


def _layers(config: MoeqConfig) -> int:
    """Return one more than the largest index of an MoE layer."""
    numbers = (next(filter(str.isdecimal, prefix.split("."))) for prefix in config.experts)
    return 1 + max(map(int, numbers))

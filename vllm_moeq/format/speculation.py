"""Layers for speculative decoding (MTP): how config.json counts them, and which tensors are theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
"""The keys in which models say how many such layers they have; vLLM reads them all."""

SPECULATIVE = ("mtp.", "model.mtp.")
"""Name prefixes of layers for speculative decoding that are no decoder layers."""

BEHIND = re.compile(r"(?:language_model\.)?model\.(?:language_model\.)?layers\.(\d+)\.")
"""The beginning of a tensor's name in the stack that ``num_hidden_layers`` counts, and the layer's index."""

JOINING = ("enorm", "hnorm", "eh_proj")
"""The modules that join a token's embedding with the hidden state, in a layer of the stack: all or none."""

_EXPERT = re.compile(r"(.*\.experts\.)(\d{1,9})(\..*)")


def announced(config: Mapping[str, Any], nested: str = "text_config") -> int:
    """Return how many layers for speculative decoding a config.json announces, itself or in its language model's part.

    Args:
        config: contents of config.json.
        nested: the key of the language model's part.
    """
    parts = [part for part in (config, config.get(nested)) if isinstance(part, Mapping)]
    return max((part[key] for part in parts for key in COUNTS if type(part.get(key)) is int), default=0)


def is_speculative(name: str, layers: int | None, more: int) -> bool:
    """Tell whether a tensor belongs to an announced layer for speculative decoding.

    Args:
        name: the tensor's name.
        layers: ``num_hidden_layers``; None where config.json does not say it.
        more: how many such layers :func:`announced` found.
    """
    if not more:
        return False
    found = BEHIND.match(name)
    behind = found is not None and layers is not None and layers <= int(found[1]) < layers + more
    return behind or name.startswith(SPECULATIVE)


def count_layers(names: Iterable[str]) -> int:
    """Return how many layers for speculative decoding the files have, at least 1 where a stack of its own has them.

    Args:
        names: the tensors for which :func:`is_speculative` holds.
    """
    found = {(match[0] if (match := BEHIND.match(name)) else SPECULATIVE[0]) for name in names}
    return len(found)


def first_gap(names: Iterable[str], experts: int = 0) -> str | None:
    """Return the beginning of a tensor's name that layers for speculative decoding lack; None if nothing shows.

    Such layers have no class in transformers that names all of their tensors. But their experts are numbered from 0 and
    alike, and the modules of :data:`JOINING` come together. A matrix that every expert lacks does not show.

    Args:
        names: the tensors for which :func:`is_speculative` holds.
        experts: the number of experts that other layers have.
    """
    joined: dict[str, set[str]] = {}
    blocks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if (match := BEHIND.match(name)) is not None:
            module = name.removeprefix(match[0]).partition(".")[0]
            joined.setdefault(match[0], set()).update({module} & set(JOINING))
        if (match := _EXPERT.match(name)) is not None:
            blocks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    for start, modules in joined.items():
        if modules and (missing := set(JOINING) - modules):
            return f"{start}{min(missing)}"
    for block, found in blocks.items():
        every = set().union(*found.values())
        for expert in range(max(experts, len(found))):
            if lacking := every - found.get(expert, set()):
                return f"{block}{expert}{min(lacking)}"
    return None

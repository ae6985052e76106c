"""Refuse keys of a ``quantization_config`` that do not agree; :mod:`vllm_moeq.format.schema` has checked each alone.

A check raises ValueError, which pydantic reports like its own problems.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from vllm_moeq.format.schemes import GRID, SCHEMES

Layers = Mapping[str, Sequence[int]]
"""The prefix of a layer's experts → their widths."""


def check_projections(names: Sequence[str]) -> None:
    """Refuse one name for two matrices of an expert.

    Args:
        names: the names of gate, up (if there is one) and down.

    Raises:
        ValueError: two are the same.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"projections: expected a name for each matrix, found {name} twice")


def check_linears(bits: int, widths: Mapping[str, int], unquantized: Collection[str], experts: Layers) -> None:
    """Refuse widths of linears that say nothing, or something else than another key.

    Args:
        bits: the width of linears that ``widths`` does not name.
        widths: name of a linear → its width.
        unquantized: names of linears that stay as they are.
        experts: the experts of all layers.

    Raises:
        ValueError: naming the linear.
    """
    prefixes, kept = tuple(f"{prefix}." for prefix in experts), set(unquantized)
    if widths and bits == 16:
        raise ValueError("linear.widths: expected none, as linear.bits is 16")
    for name, width in widths.items():
        place = f"linear.widths: {name}"
        if width == 16:
            raise ValueError(f"{place}: expected 4 or 8, as `unquantized` names those of 16, found 16")
        if width == bits:
            raise ValueError(f"{place}: expected another width than linear.bits, found {width}")
        if name in kept:
            raise ValueError(f"{place}: expected a packed linear, found it among `unquantized` too")
        if name.startswith(prefixes):
            raise ValueError(f"{place}: expected a linear outside the experts, found an expert's")


def check_schemes(schemes: Mapping[str, Sequence[str]] | None, experts: Layers) -> None:
    """Refuse schemes that are unknown, lack an expert's width, or say nothing.

    Args:
        schemes: the prefix of a layer's experts → the names of their schemes.
        experts: the experts of all layers.

    Raises:
        ValueError: naming the layer, and the expert if it is one.
    """
    if schemes == {}:
        raise ValueError("schemes: expected a layer, found none")
    for prefix, names in (schemes or {}).items():
        widths = experts.get(prefix)
        if widths is None:
            raise ValueError(f"schemes: {prefix} is not among experts")
        if len(names) != len(widths):
            raise ValueError(f"schemes: {prefix}: expected {len(widths)} names, found {len(names)}")
        for expert, (name, bits) in enumerate(zip(names, widths, strict=True)):
            place = f"schemes: {prefix}: expert {expert}"
            if name not in SCHEMES:
                raise ValueError(f"{place}: expected {' or '.join(SCHEMES)}, found {name!r}")
            if bits not in SCHEMES[name].widths:
                known = ", ".join(map(str, SCHEMES[name].widths))
                raise ValueError(f"{place}: expected one of {known} bits for {name}, found {bits}")
        if set(names) == {GRID.name}:
            raise ValueError(f"schemes: {prefix}: expected another scheme than {GRID.name}, found only that")


def check_choices(choices: Collection[int], experts: Layers) -> None:
    """Refuse widths that the plan could not choose.

    Args:
        choices: the plan's widths.
        experts: the experts of all layers.

    Raises:
        ValueError: naming the layer and the expert.
    """
    for prefix, widths in experts.items():
        for expert, bits in enumerate(widths):
            if bits not in choices:
                raise ValueError(
                    f"{prefix}: expert {expert} has {bits} bits, which is not among bit_choices {sorted(set(choices))}"
                )


def check_thresholds(odp: Collection[str] | None, experts: Layers) -> None:
    """Refuse thresholds of no layer.

    Args:
        odp: the prefixes that have a threshold.
        experts: the experts of all layers.

    Raises:
        ValueError: naming the layer.
    """
    for prefix in odp or ():
        if prefix not in experts:
            raise ValueError(f"odp: {prefix} is not among experts")


def check_fallback(fallback: Mapping[str, Sequence[int]] | None, experts: Layers) -> None:
    """Refuse experts that do not exist.

    Args:
        fallback: the prefix of a layer's experts → those that another quantizer quantized.
        experts: the experts of all layers.

    Raises:
        ValueError: naming the layer, and the expert if it is one.
    """
    for prefix, chosen in (fallback or {}).items():
        if prefix not in experts:
            raise ValueError(f"plan.fallback: {prefix} is not among experts")
        count = len(experts[prefix])
        for expert in chosen:
            if expert >= count:
                raise ValueError(f"plan.fallback: {prefix}: expected experts below {count}, found {expert}")

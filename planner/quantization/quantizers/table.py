"""The table of quantizers for expert matrices. A new quantizer needs a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from planner.quantization.quantizers.base import Quantizer, ZeroPoints
from planner.quantization.quantizers.gptq import Solve, quantize_gptq
from planner.quantization.quantizers.hqq import quantize_hqq
from planner.quantization.quantizers.rtn import quantize_rtn
from planner.quantization.quantizers.sign import quantize_sign
from planner.quantization.quantizers.trellis import round_trellis, solve_trellis
from vllm_moeq.format import BIT_WIDTHS, GRID, SCHEMES, TRELLIS_SCHEME, Scheme, UsageError


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer.

    Attributes:
        widths: widths in bits that the quantizer offers.
        rounds: kind of zero points → function that needs only the weights. One bit always has float zero points.
            Empty for a quantizer with calibration.
        solve: function that also needs the moments of the layer's inputs; None for a quantizer without calibration.
        fallback: name of the quantizer for experts that saw too few tokens; None for a quantizer without calibration.
        scheme: storage scheme of the results.
        others: name of another scheme → name of the quantizer that finds its codes in this one's place. ``--quantizer``
            offers the quantizers of grids, and ``--scheme`` chooses among a row's others.
        one_bit: whether another quantizer is used for one bit without calibration.
        tuned: whether it reads the flags for the order of columns and the search for scales.
    """

    widths: tuple[int, ...] = BIT_WIDTHS
    rounds: Mapping[ZeroPoints, Quantizer] = field(default_factory=dict)
    solve: Solve | None = None
    fallback: str | None = None
    scheme: Scheme = GRID
    others: Mapping[str, str] = field(default_factory=dict)
    one_bit: bool = True
    tuned: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer needs a calibration text."""
        return self.solve is not None


ALONE, WITH_TEXT = {TRELLIS_SCHEME.name: "viterbi"}, {TRELLIS_SCHEME.name: "trellis"}
"""The quantizers of other schemes, without and with calibration."""

QUANTIZERS: dict[str, QuantizerRow] = {
    "sign": QuantizerRow((1,), {"float": quantize_sign}, others=ALONE),
    "hqq": QuantizerRow(
        rounds={"float": quantize_hqq, "integer": partial(quantize_hqq, zero_points="integer")}, others=ALONE
    ),
    "rtn": QuantizerRow(
        rounds={"float": quantize_rtn, "integer": partial(quantize_rtn, zero_points="integer")}, others=ALONE
    ),
    "gptq": QuantizerRow(solve=quantize_gptq, fallback="hqq", others=WITH_TEXT, tuned=True),
    "viterbi": QuantizerRow(TRELLIS_SCHEME.widths, {"float": round_trellis}, scheme=TRELLIS_SCHEME, one_bit=False),
    "trellis": QuantizerRow(
        TRELLIS_SCHEME.widths, solve=solve_trellis, fallback="viterbi", scheme=TRELLIS_SCHEME, one_bit=False
    ),
}

SchemeName = Literal["grid", "trellis"]
"""The scheme of a checkpoint's experts: ``trellis`` for those whose width it has, beside grids of other widths."""

SchemeChoice = Literal["auto", "grid", "trellis"]
"""A scheme, or ``auto``: the plan chooses for each expert."""

AUTO_SCHEME: SchemeChoice = "auto"

POSSIBLE: dict[SchemeChoice, tuple[SchemeName, ...]] = {
    "auto": ("grid", "trellis"),
    "grid": ("grid",),
    "trellis": ("trellis",),
}
"""What is asked for → the schemes that a plan may choose. The first one stands for it until there is a plan."""


def scheme_for(bits: int, name: str) -> Scheme:
    """Return the scheme of experts of a width where ``name`` is asked for: a grid where the named one lacks it."""
    scheme = SCHEMES[name]
    return scheme if bits in scheme.widths else GRID


def possible_schemes(choice: SchemeChoice, widths: Iterable[int]) -> tuple[Scheme, ...]:
    """Return the schemes that experts of these widths may get where ``choice`` is asked for."""
    return tuple(dict.fromkeys(scheme_for(bits, name) for name in POSSIBLE[choice] for bits in widths))


DEFAULT, DEFAULT_WITH_TEXT, DEFAULT_ONE_BIT = "hqq", "gptq", "sign"


def default_quantizer(text: bool) -> str:
    """Return the name of the default quantizer for two bits and more, with or without a calibration text."""
    return DEFAULT_WITH_TEXT if text else DEFAULT


def quantizer_names() -> list[str]:
    """Return the names of the quantizers for two bits and more; ``--scheme`` chooses others in their place."""
    return [name for name, row in QUANTIZERS.items() if max(row.widths) > 1 and row.scheme is GRID]


def one_bit_names() -> list[str]:
    """Return the names of the quantizers for one bit that need no calibration."""
    return [name for name, row in QUANTIZERS.items() if 1 in row.widths and row.one_bit and not row.calibrated]


def calibrated_names() -> list[str]:
    """Return the names of the quantizers that read a calibration text."""
    return [name for name in quantizer_names() if QUANTIZERS[name].calibrated]


def tuned_names() -> list[str]:
    """Return the names of the quantizers that read the flags for the order of columns and the search for scales."""
    return [name for name, row in QUANTIZERS.items() if row.tuned]


def quantizer_name(scheme: Scheme, name: str) -> str:
    """Return the name of the quantizer whose results are stored by a scheme, where ``name`` is asked for."""
    row = QUANTIZERS[name]
    return name if row.scheme is scheme else row.others.get(scheme.name, name)


def name_without_text(bits: int, name: str, one_bit: str, scheme: Scheme = GRID) -> str:
    """Return the name of the quantizer for a width that uses the weights alone; see :func:`quantizer_for`."""
    own = quantizer_name(scheme, name)
    row = QUANTIZERS[own]
    return one_bit if bits == 1 and row.one_bit else row.fallback or own


def quantizer_for(
    bits: int, name: str, one_bit: str, zero_points: ZeroPoints = "float", scheme: Scheme = GRID
) -> Quantizer:
    """Return the function that quantizes to a width from the weights alone.

    Args:
        bits: the width.
        name: name of the quantizer for two bits and more; if it needs calibration, its fallback is used.
        one_bit: name of the quantizer for one bit.
        zero_points: kind of zero points for two bits and more.
        scheme: the scheme of the results; one without zero points ignores their kind.
    """
    rounds = QUANTIZERS[name_without_text(bits, name, one_bit, scheme)].rounds
    return rounds["float" if bits == 1 or scheme is not GRID else zero_points]


def _without_text(name: str) -> QuantizerRow:
    """Return the row of a quantizer, or of its fallback if it needs calibration."""
    row = QUANTIZERS[name]
    return row if row.fallback is None else QUANTIZERS[row.fallback]


def check_zero_points(name: str, zero_points: ZeroPoints) -> None:
    """Refuse a kind of zero points that a quantizer does not offer.

    Raises:
        UsageError: naming the quantizers that offer it.
    """
    if zero_points not in _without_text(name).rounds:
        others = " or ".join(other for other in quantizer_names() if zero_points in _without_text(other).rounds)
        raise UsageError(f"--zero-points {zero_points}: expected --quantizer {others} with it, found {name}")


def check_widths(name: str, widths: Iterable[int]) -> None:
    """Refuse widths that a quantizer for two bits and more does not offer.

    Raises:
        UsageError: naming the widths that it offers.
    """
    known = QUANTIZERS[name].widths
    if missing := sorted(set(widths) - {1, *known}):
        raise UsageError(
            f"--quantizer {name}: expected widths among {', '.join(map(str, known))} (--bits), found {missing[0]}"
        )

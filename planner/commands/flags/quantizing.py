"""The flags that say how codes are found and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from planner.api.keywords.codes import (
    CodeKeywords,
    ComparedCodeKeywords,
    GptqKeywords,
    SchemeKeyword,
    StorageKeywords,
    WrittenCodeKeywords,
)
from planner.commands.flatten import OneOf
from planner.quantization.quantizers.base import ZeroPoints
from planner.quantization.quantizers.hessian import ActOrder
from planner.quantization.quantizers.linear import LINEAR_DEFAULT, LINEAR_DEFAULT_WITH_TEXT, LINEAR_QUANTIZERS
from planner.quantization.quantizers.table import (
    DEFAULT,
    DEFAULT_WITH_TEXT,
    QUANTIZERS,
    SchemeChoice,
    calibrated_names,
    one_bit_names,
    quantizer_names,
)
from planner.quantization.settings import Calibration, QuantizeSettings

NAMES = OneOf(quantizer_names())


def _fallbacks() -> str:
    """Return what the quantizers with calibration use without it, for a help text."""
    return ", ".join(f"{name}: {row.fallback}" for name, row in QUANTIZERS.items() if row.calibrated)


def _linear_defaults() -> str:
    """Return the default quantizer of linears beside each experts' quantizer, for a help text."""
    return f"{LINEAR_DEFAULT_WITH_TEXT} with {' or '.join(calibrated_names())}, else {LINEAR_DEFAULT}"


Scheme = Annotated[
    SchemeChoice | None,
    typer.Option(
        "--scheme",
        help="How experts are stored: grid; trellis, closer to the original and slower to compute; "
        f"auto, by the plan's measurements [{QuantizeSettings.scheme}, or the plan's].",
    ),
]


@dataclass(frozen=True)
class QuantizerFlags:
    """The quantizers."""

    quantizer: Annotated[
        str | None,
        typer.Option(
            "--quantizer",
            metavar="NAME",
            help=f"Quantizer for two bits and more: {', '.join(quantizer_names())}; with trellises gptq is "
            f"calibrated and the others are not [{DEFAULT_WITH_TEXT} with --data, else {DEFAULT}].",
        ),
        NAMES,
    ] = None
    one_bit: Annotated[
        str,
        typer.Option("--one-bit", help="Quantizer of grids for one bit, without calibration."),
        OneOf(one_bit_names()),
    ] = CodeKeywords.one_bit
    min_tokens: Annotated[
        int,
        typer.Option(
            "--min-tokens",
            min=1,
            help=f"Tokens below which an expert is quantized without calibration ({_fallbacks()}).",
        ),
    ] = CodeKeywords.min_tokens
    linear_quantizer: Annotated[
        str | None,
        typer.Option("--linear-quantizer", help=f"Quantizer of other linears [{_linear_defaults()}]."),
        OneOf(list(LINEAR_QUANTIZERS)),
    ] = None
    calibration: Annotated[
        Calibration | None,
        typer.Option(
            "--calibration",
            help="GPTQ: aim at the original's outputs, or at those for the own inputs "
            "[asymmetric; symmetric with --compat].",
        ),
    ] = None


@dataclass(frozen=True)
class WrittenQuantizerFlags(QuantizerFlags):
    """The same for a checkpoint that is written."""

    zero_points: Annotated[
        ZeroPoints, typer.Option("--zero-points", help="Zero points of grids; other formats need integer ones.")
    ] = WrittenCodeKeywords.zero_points
    scheme: Scheme = SchemeKeyword.scheme


@dataclass(frozen=True)
class ComparedQuantizerFlags(QuantizerFlags):
    """The same for ``moeq compare``, where a text alone chooses no quantizer."""

    quantizer: Annotated[
        str,
        typer.Option(
            "--quantizer",
            metavar="NAME",
            help=f"Quantizer for two bits and more: {', '.join(quantizer_names())}.",
        ),
        NAMES,
    ] = ComparedCodeKeywords.quantizer


@dataclass(frozen=True)
class StorageFlags:
    """The scales of experts, and the format of other linears."""

    group_size: Annotated[
        int,
        typer.Option(
            "--group-size",
            help="Weights per scale of a grid, a multiple of 32; -1 for whole rows. A trellis has one per row.",
        ),
    ] = StorageKeywords.group_size
    linear_bits: Annotated[
        str | None,
        typer.Option(
            "--linear-bits",
            metavar="BITS",
            help="Width of attention and other linears: 4, 8, 16, or auto: from the bytes of the experts "
            "[4, or the plan's].",
        ),
    ] = None
    linear_group_size: Annotated[
        int | None,
        typer.Option("--linear-group-size", help="Weights of linears per scale [128, or what K / 4 is a multiple of]."),
    ] = None


@dataclass(frozen=True)
class ComparedStorageFlags(StorageFlags):
    """The same for ``moeq compare``, where all methods have the same linears."""

    linear_bits: Annotated[
        str | None,
        typer.Option("--linear-bits", metavar="BITS", help="Width of attention and other linears: 4, 8 or 16 [4]."),
    ] = None


@dataclass(frozen=True)
class GptqFlags:
    """The variants of GPTQ."""

    damping: Annotated[
        float, typer.Option("--damping", help="GPTQ: added to the Hessian, relative to its mean diagonal.")
    ] = GptqKeywords.damping
    act_order: Annotated[
        ActOrder,
        typer.Option("--act-order", help="GPTQ: columns by importance, within groups or (static groups) all."),
    ] = GptqKeywords.act_order
    static_groups: Annotated[bool, typer.Option("--static-groups", help="GPTQ: scales from the original weights.")] = (
        GptqKeywords.static_groups
    )
    symmetric: Annotated[bool, typer.Option("--symmetric", help="GPTQ: zero points in the middle of the codes.")] = (
        GptqKeywords.symmetric
    )
    scale_search: Annotated[
        Literal["mse", "range"], typer.Option("--scale-search", help="GPTQ: least weighted error, or the range.")
    ] = GptqKeywords.scale_search
    sweeps: Annotated[
        int,
        typer.Option("--sweeps", min=0, help="GPTQ: passes afterwards over all codes and scales, given their errors."),
    ] = GptqKeywords.sweeps
    compat: Annotated[
        bool, typer.Option("--compat", help="GPTQ: the variant of the paper's published code; symmetric.")
    ] = GptqKeywords.compat

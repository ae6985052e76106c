"""The flags that say how codes are found and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from planner.commands.flatten import OneOf
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.quantization.quantizers.base import ZeroPoints
from planner.quantization.quantizers.gptq import PUBLISHED, GptqSettings
from planner.quantization.quantizers.hessian import ActOrder
from planner.quantization.quantizers.table import (
    DEFAULT,
    DEFAULT_ONE_BIT,
    DEFAULT_WITH_TEXT,
    QUANTIZERS,
    default_quantizer,
    one_bit_names,
    quantizer_names,
)
from planner.quantization.settings import QuantizeSettings, default_linear
from vllm_moeq.format import CODES_PER_BLOCK, WHOLE_ROW, Linear, UsageError

NAMES = OneOf(quantizer_names())


def _fallbacks() -> str:
    """Return what the quantizers with calibration use without it, for a help text."""
    return ", ".join(f"{name}: {row.fallback}" for name, row in QUANTIZERS.items() if row.calibrated)


@dataclass(frozen=True)
class QuantizerFlags:
    """The quantizers."""

    quantizer: Annotated[
        str | None,
        typer.Option(
            "--quantizer", help=f"Quantizer for two bits and more [{DEFAULT_WITH_TEXT} with --data, else {DEFAULT}]."
        ),
        NAMES,
    ] = None
    one_bit: Annotated[
        str, typer.Option("--one-bit", help="Quantizer for one bit, without calibration."), OneOf(one_bit_names())
    ] = DEFAULT_ONE_BIT
    min_tokens: Annotated[
        int,
        typer.Option(
            "--min-tokens",
            min=1,
            help=f"Tokens below which an expert is quantized without calibration ({_fallbacks()}).",
        ),
    ] = QuantizeSettings.min_tokens

    def resolved(self, text: bool) -> str:
        """Return the quantizer for two bits and more, by whether there is a text where no flag names one."""
        return default_quantizer(text) if self.quantizer is None else self.quantizer


@dataclass(frozen=True)
class WrittenQuantizerFlags(QuantizerFlags):
    """The same for a checkpoint that is written."""

    zero_points: Annotated[
        ZeroPoints, typer.Option("--zero-points", help="Zero points of experts; other formats need integer ones.")
    ] = QuantizeSettings.zero_points


@dataclass(frozen=True)
class ComparedQuantizerFlags(QuantizerFlags):
    """The same for ``moeq compare``, where a text alone chooses no quantizer."""

    quantizer: Annotated[str, typer.Option("--quantizer", help="Quantizer for two bits and more."), NAMES] = DEFAULT


@dataclass(frozen=True)
class StorageFlags:
    """The scales of experts, and the format of other linears."""

    group_size: Annotated[
        int, typer.Option("--group-size", help="Expert weights per scale, a multiple of 32; -1 for whole rows.")
    ] = QuantizeSettings.group_size
    linear_bits: Annotated[
        int, typer.Option("--linear-bits", help="Width of attention and other linears: 4, 8 (GPU only) or 16.")
    ] = 4
    linear_group_size: Annotated[
        int | None,
        typer.Option("--linear-group-size", help="Weights of linears per scale [128, or what K / 4 is a multiple of]."),
    ] = None

    def checked_group_size(self) -> int:
        """Return the group size; raise UsageError for one that the format does not have."""
        size = self.group_size
        if size != WHOLE_ROW and (size < CODES_PER_BLOCK or size % CODES_PER_BLOCK):
            raise UsageError(f"--group-size: expected a multiple of {CODES_PER_BLOCK}, or -1, found {size}")
        return size

    def linear(self, model: SourceModel, layout: Layout) -> Linear:
        """Return the format of the linears that are not experts; raise UsageError for an impossible one."""
        bits, group = self.linear_bits, self.linear_group_size
        if bits not in (4, 8, 16):
            raise UsageError(f"--linear-bits: expected 4, 8 or 16, the widths that vLLM's kernels serve, found {bits}")
        if group is None:
            return default_linear(model, layout, bits)
        if group < CODES_PER_BLOCK or group % CODES_PER_BLOCK:
            raise UsageError(f"--linear-group-size: expected a multiple of {CODES_PER_BLOCK}, found {group}")
        return Linear.model_validate({"bits": bits, "group_size": group})


@dataclass(frozen=True)
class GptqFlags:
    """The variants of GPTQ."""

    damping: Annotated[
        float, typer.Option("--damping", help="GPTQ: added to the Hessian, relative to its mean diagonal.")
    ] = GptqSettings.damping
    act_order: Annotated[
        ActOrder,
        typer.Option("--act-order", help="GPTQ: columns by importance, within groups or (static groups) all."),
    ] = GptqSettings.act_order
    static_groups: Annotated[bool, typer.Option("--static-groups", help="GPTQ: scales from the original weights.")] = (
        GptqSettings.static_groups
    )
    symmetric: Annotated[bool, typer.Option("--symmetric", help="GPTQ: zero points in the middle of the codes.")] = (
        GptqSettings.symmetric
    )
    scale_search: Annotated[
        Literal["mse", "range"], typer.Option("--scale-search", help="GPTQ: least weighted error, or the range.")
    ] = "mse"
    compat: Annotated[bool, typer.Option("--compat", help="GPTQ: the variant of the paper's published code.")] = False

    def settings(self) -> GptqSettings:
        """Return the settings.

        Raises:
            UsageError: flags that exclude each other, or a damping that is no fraction.
        """
        if not 0 <= self.damping <= 1:
            raise UsageError(f"--damping: expected a number between 0 and 1, found {self.damping:g}")
        if self.act_order == "full" and not self.static_groups:
            raise UsageError("--act-order full: expected --static-groups too, or groups would have no fixed columns")
        made = GptqSettings(self.damping, self.act_order, self.static_groups, self.symmetric, self.scale_search)
        if not self.compat:
            return made
        if made != GptqSettings():
            raise UsageError("--compat: expected no other GPTQ flags, it stands for all of them")
        return PUBLISHED

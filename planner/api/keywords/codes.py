"""The keyword arguments that say how codes are found and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from planner.api.keywords.common import Count, one_of
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.quantization.quantizers.base import ZeroPoints
from planner.quantization.quantizers.gptq import PUBLISHED, GptqSettings
from planner.quantization.quantizers.hessian import ActOrder
from planner.quantization.quantizers.linear import LINEAR_QUANTIZERS, default_linear_quantizer
from planner.quantization.quantizers.table import (
    DEFAULT,
    DEFAULT_ONE_BIT,
    POSSIBLE,
    QUANTIZERS,
    SchemeChoice,
    SchemeName,
    calibrated_names,
    default_quantizer,
    one_bit_names,
    quantizer_names,
)
from planner.quantization.settings import Calibration, QuantizeSettings, default_linear
from vllm_moeq.format import CODES_PER_BLOCK, WHOLE_ROW, Linear, UsageError

QuantizerName = Annotated[str, one_of(quantizer_names())]
LinearQuantizerName = Annotated[str, one_of(list(LINEAR_QUANTIZERS))]
OneBitName = Annotated[str, one_of(one_bit_names())]


@dataclass(frozen=True, kw_only=True)
class QuantizerKeyword:
    """The quantizer for two bits and more.

    Attributes:
        quantizer: quantizer for two bits and more: ``hqq``, ``rtn`` or ``gptq``; None is ``gptq`` with a
            text, and for a plan with statistics of one, else ``hqq``.
    """

    quantizer: QuantizerName | None = None

    def resolved_quantizer(self, text: bool) -> str:
        """Return the quantizer for two bits and more, by whether there is a text where no keyword names one."""
        return default_quantizer(text) if self.quantizer is None else self.quantizer


@dataclass(frozen=True, kw_only=True)
class CodeKeywords(QuantizerKeyword):
    """The quantizers.

    Attributes:
        one_bit: quantizer for one bit, without calibration: ``sign``, ``hqq`` or ``rtn``.
        min_tokens: tokens below which an expert is quantized without calibration.
        linear_quantizer: quantizer of attention and other linears: ``rtn`` or ``gptq``; None is ``gptq`` if the
            experts' quantizer reads a text, else ``rtn``.
        calibration: GPTQ: aim at the original layer's outputs for the original model's inputs (``asymmetric``), or for
            the inputs behind quantized layers (``symmetric``); None is ``asymmetric``, with ``compat`` ``symmetric``.
    """

    one_bit: OneBitName = DEFAULT_ONE_BIT
    min_tokens: Count = QuantizeSettings.min_tokens
    linear_quantizer: LinearQuantizerName | None = None
    calibration: Calibration | None = None

    def resolved_calibration(self, compat: bool = False) -> Calibration:
        """Return what a quantizer with calibration aims at: the published code's is symmetric."""
        return self.calibration or ("symmetric" if compat else QuantizeSettings.calibration)

    def resolved_linear_quantizer(self, calibrated: bool) -> str:
        """Return the quantizer of linears, by whether the experts' quantizer reads a text where none is named.

        Raises:
            UsageError: a quantizer with calibration beside an experts' quantizer without one.
        """
        name = self.linear_quantizer or default_linear_quantizer(calibrated)
        if LINEAR_QUANTIZERS[name].calibrated and not calibrated:
            others = " or ".join(calibrated_names())
            raise UsageError(f"--linear-quantizer {name}: expected --quantizer {others} with it")
        return name


@dataclass(frozen=True, kw_only=True)
class WrittenCodeKeywords(CodeKeywords):
    """The same for a checkpoint that is written.

    Attributes:
        zero_points: kind of zero points of experts; other formats need ``integer``.
    """

    zero_points: ZeroPoints = QuantizeSettings.zero_points


@dataclass(frozen=True, kw_only=True)
class ComparedCodeKeywords(CodeKeywords):
    """The same for a comparison, where a text alone chooses no quantizer.

    Attributes:
        quantizer: quantizer for two bits and more: ``hqq``, ``rtn`` or ``gptq``.
    """

    quantizer: QuantizerName = DEFAULT

    def gptq_settings(self) -> GptqSettings | None:
        """Return the settings of GPTQ, if it is the quantizer."""
        return GptqSettings() if QUANTIZERS[self.quantizer].calibrated else None


AUTO = "auto"
"""The value that has the plan choose."""

LEAST = 4
"""Width of linears where nothing says otherwise."""


def _linear_bits(value: object) -> str:
    """Return a width of linears as its digits, or ``auto``; a flag's text and a number are the same."""
    name = str(value)
    if name not in (AUTO, "4", "8", "16"):
        raise ValueError("expected 4, 8 or 16, the widths that vLLM's kernels serve, or auto")
    return name


LinearBitsName = Annotated[int | str, AfterValidator(_linear_bits)]


@dataclass(frozen=True, kw_only=True)
class SchemeKeyword:
    """The scheme of the experts.

    Attributes:
        scheme: how experts are stored: ``grid``; ``trellis``, which is closer to the original and slower to compute; or
            ``auto``, what costs less by the plan's measurements. None is ``grid``, or what a plan says.
    """

    scheme: SchemeChoice | None = None

    @property
    def resolved_scheme(self) -> SchemeChoice:
        """The scheme that is asked for, or the default."""
        return self.scheme or QuantizeSettings.scheme

    @property
    def settled_scheme(self) -> SchemeName:
        """The scheme of the settings before there is a plan: a grid's sizes bound those of ``auto``."""
        return POSSIBLE[self.resolved_scheme][0]


@dataclass(frozen=True, kw_only=True)
class StorageKeywords:
    """The scales of experts, and the format of other linears.

    Attributes:
        group_size: expert weights per scale of a grid, a multiple of 32; -1 for whole rows.
        linear_bits: width of attention and other linears: 4, 8 or 16; ``auto`` chooses for each, from the
            same bytes as the experts; None is 4, or what a plan says.
        linear_group_size: weights of linears per scale; None is 128, or what a quarter of the input dimension allows.
    """

    group_size: int = QuantizeSettings.group_size
    linear_bits: LinearBitsName | None = None
    linear_group_size: int | None = None

    def checked_group_size(self) -> int:
        """Return the group size; raise UsageError for one that the format does not have."""
        size = self.group_size
        if size != WHOLE_ROW and (size < CODES_PER_BLOCK or size % CODES_PER_BLOCK):
            raise UsageError(f"--group-size: expected a multiple of {CODES_PER_BLOCK}, or -1, found {size}")
        return size

    @property
    def linears_compete(self) -> bool:
        """Whether the plan chooses a width for each linear."""
        return self.linear_bits == AUTO

    def linear(self, model: SourceModel, layout: Layout) -> Linear:
        """Return the format of the linears that are not experts, as long as there is no plan with their widths.

        Raises:
            UsageError: a group size that the format does not have.
        """
        bits, group = LEAST if self.linear_bits in (None, AUTO) else int(self.linear_bits), self.linear_group_size
        if group is None:
            return default_linear(model, layout, bits)
        if group < CODES_PER_BLOCK or group % CODES_PER_BLOCK:
            raise UsageError(f"--linear-group-size: expected a multiple of {CODES_PER_BLOCK}, found {group}")
        return Linear.model_validate({"bits": bits, "group_size": group})


@dataclass(frozen=True, kw_only=True)
class GptqKeywords:
    """The variants of GPTQ.

    Attributes:
        damping: GPTQ: added to the Hessian, relative to its mean diagonal.
        act_order: GPTQ: columns by importance, within a ``group`` or, with static groups, ``full``; or ``none``.
        static_groups: GPTQ: take scales from the original weights.
        symmetric: GPTQ: zero points in the middle of the codes.
        scale_search: GPTQ: the least weighted error (``mse``), or the ``range``.
        sweeps: GPTQ: passes afterwards that fit scales and codes to the errors of all columns; none with static groups.
        compat: GPTQ: the variant of the paper's published code; stands for all of the others.
    """

    damping: float = GptqSettings.damping
    act_order: ActOrder = GptqSettings.act_order
    static_groups: bool = GptqSettings.static_groups
    symmetric: bool = GptqSettings.symmetric
    scale_search: Literal["mse", "range"] = "mse"
    sweeps: Annotated[int, Field(ge=0)] = GptqSettings.sweeps
    compat: bool = False

    def gptq_settings(self) -> GptqSettings:
        """Return the settings.

        Raises:
            UsageError: keywords that exclude each other, or a damping that is no fraction.
        """
        if self.compat:
            return PUBLISHED  # flags beside it are refused
        if not 0 <= self.damping <= 1:
            raise UsageError(f"--damping: expected a number between 0 and 1, found {self.damping:g}")
        if self.act_order == "full" and not self.static_groups:
            raise UsageError("--act-order full: expected --static-groups too, or groups would have no fixed columns")
        sweeps = 0 if self.static_groups else self.sweeps
        return GptqSettings(self.damping, self.act_order, self.static_groups, self.symmetric, self.scale_search, sweeps)

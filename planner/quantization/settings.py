"""The settings that decide the output besides model and plan, and checks that they fit the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from planner.model.layout import Layout, MoeLayer
from planner.model.sizes import Storage
from planner.model.source import SourceModel
from planner.plan_file import Plan
from planner.quantization.quantizers import QUANTIZERS, ZeroPoints, linear_group_size
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.linear import LINEAR_DEFAULT, LINEAR_QUANTIZERS
from planner.quantization.quantizers.rotated import rotation_of
from planner.quantization.quantizers.table import (
    DEFAULT,
    DEFAULT_ONE_BIT,
    SchemeName,
    check_zero_points,
    name_without_text,
    quantizer_name,
)
from vllm_moeq.format import (
    CODES_PER_BLOCK,
    GRID,
    SCHEMES,
    WHOLE_ROW,
    CheckpointError,
    Linear,
    Rotation,
    Scheme,
    UsageError,
    split_width,
)

Calibration = Literal["asymmetric", "symmetric"]
"""What a quantizer with calibration aims at. ``asymmetric`` is what the original layer gives for the original model's
inputs, so that later layers make up for the errors of earlier ones. ``symmetric`` is what the original layer gives for
the inputs that it gets behind quantized layers."""


@dataclass(frozen=True)
class QuantizeSettings:
    """The settings that decide the output besides model and plan.

    Attributes:
        quantizer: name of the quantizer for two bits and more.
        one_bit: name of the quantizer for one bit, without calibration.
        group_size: expert weights per scale, or −1 for whole rows.
        linear: format of the linears that are not experts.
        zero_points: kind of zero points of experts with two bits and more.
        gptq: settings of GPTQ, if it is the quantizer.
        min_tokens: minimum number of calibration tokens; an expert that saw fewer is quantized without calibration.
        linear_quantizer: name of the quantizer of linears; one with calibration needs a quantizer with calibration.
        calibration: see :data:`Calibration`; without meaning for a quantizer without calibration.
        scheme: scheme of the experts whose width it has, where no plan says it. All experts of a checkpoint with
            another scheme than the grid are rotated.
        schemes: experts prefix → name of each expert's scheme, where a plan says it.

    The fingerprint of a run contains every field, so a new field needs no other change there.

    Raises:
        UsageError: the quantizer does not offer this kind of zero points.
    """

    quantizer: str = DEFAULT
    one_bit: str = DEFAULT_ONE_BIT
    group_size: int = 128
    linear: Linear = field(default_factory=lambda: Linear(bits=4))
    zero_points: ZeroPoints = "float"
    gptq: GptqSettings | None = None
    min_tokens: int = 64
    linear_quantizer: str = LINEAR_DEFAULT
    calibration: Calibration = "asymmetric"
    scheme: SchemeName = "grid"
    schemes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_zero_points(self.quantizer, self.zero_points)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "linear": self.linear.model_dump(mode="json")}

    @property
    def storage(self) -> Storage:
        """How the experts are stored."""
        scheme = SCHEMES[self.scheme]
        return Storage(scheme, scheme is not GRID, self.schemes)

    def rotation(self, layer: MoeLayer) -> Rotation | None:
        """Return the sizes of a layer's rotation; None where experts are not rotated."""
        return rotation_of(layer) if self.storage.rotated else None

    def quantizer_of(self, scheme: Scheme) -> str:
        """Return the name of the quantizer for experts of a scheme."""
        return quantizer_name(scheme, self.quantizer)

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer needs a calibration text."""
        return QUANTIZERS[self.quantizer].calibrated

    @property
    def linears_calibrated(self) -> bool:
        """Whether the quantizer of linears needs a calibration text."""
        return LINEAR_QUANTIZERS[self.linear_quantizer].calibrated

    @property
    def asymmetric(self) -> bool:
        """Whether the calibration carries the original model's hidden states too."""
        return self.calibration == "asymmetric"

    @property
    def streams(self) -> int:
        """Number of streams of hidden states that quantizing carries; 0 without calibration."""
        return (2 if self.asymmetric else 1) if self.calibrated else 0

    @property
    def sweeps(self) -> int:
        """Number of passes over all codes after GPTQ; 0 without it."""
        return (self.gptq or GptqSettings()).sweeps if self.calibrated and self.storage.scheme is GRID else 0

    def with_plan(self, plan: Plan) -> QuantizeSettings:
        """Return the settings with what a plan says of linears and schemes; the same where it says nothing."""
        made = self
        if plan.linears:
            made = replace(made, linear=made.linear.model_copy(update={"widths": dict(plan.linears)}))
        return replace(made, scheme="trellis", schemes=plan.schemes) if plan.schemes else made

    def without_text(self, bits: int, scheme: Scheme = GRID) -> str:
        """Return the name of the quantizer for experts of this width and scheme that uses the weights alone."""
        return name_without_text(bits, self.quantizer, self.one_bit, scheme)


def default_linear(model: SourceModel, layout: Layout, bits: int) -> Linear:
    """Return the linear format for a width, with a group size that tensor parallelism can split."""
    sizes = [model.shards.info(name).shape[1] for name in layout.linears]
    return Linear.model_validate({"bits": bits, "group_size": linear_group_size(sizes)})


def check_sizes(model: SourceModel, layout: Layout, settings: QuantizeSettings, schemes: Iterable[Scheme]) -> None:
    """Refuse dimensions that cannot be packed, before any work.

    Args:
        model: the source.
        layout: its layers.
        settings: how it will be quantized.
        schemes: the schemes that experts may have.

    Raises:
        CheckpointError: a dimension does not fit; the message names the first such tensor.
        UsageError: a width is for a linear that the model lacks, or differs from one that vLLM joins with it.
    """
    for scheme in schemes:
        for layer in layout.layers:
            for projection, (rows, columns) in layer.shapes.items():
                name = layer.weight(0, projection)
                group = settings.group_size if scheme.grouped and settings.group_size != WHOLE_ROW else 1
                _check_columns(model, name, columns, scheme.column_step, group, "--group-size")
                if rows % scheme.row_step:
                    raise CheckpointError(
                        f"{model.shards.place(name)}: expected a multiple of {scheme.row_step} output neurons for "
                        f"{scheme.name}, found {rows}"
                    )
    _check_linear_widths(layout, settings.linear)
    for name in layout.linears:
        if settings.linear.bits_of(name) != 16:
            columns = model.shards.info(name).shape[1]
            group = settings.linear.group_size
            _check_columns(model, name, columns, CODES_PER_BLOCK, group, "--linear-group-size")


def _check_linear_widths(layout: Layout, linear: Linear) -> None:
    widths = {name.removesuffix(".weight"): linear.bits_of(name) for name in layout.linears}
    for name in linear.widths:
        if name not in widths:
            raise UsageError(f"widths of linears: {name}: expected one of the model's linears, found none of this name")
    reason = split_width(widths)
    if reason is not None:
        raise UsageError(f"widths of linears: {reason}")


def _check_columns(model: SourceModel, name: str, columns: int, block: int, group: int, flag: str) -> None:
    for divisor, why in ((block, "the packing block"), (group, flag)):
        if columns % divisor:
            path = model.folder / model.shards.info(name).shard
            raise CheckpointError(
                f"{path}: tensor {name}: expected an input dimension that is a multiple of {divisor} ({why}), "
                f"found {columns}"
            )

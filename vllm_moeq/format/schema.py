"""The ``quantization_config`` of a moeq checkpoint, format versions 1 and 2 (docs/format.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vllm_moeq.format.agreement import (
    check_choices,
    check_fallback,
    check_linears,
    check_projections,
    check_schemes,
    check_thresholds,
)
from vllm_moeq.format.errors import ConfigError
from vllm_moeq.format.fields import (
    MAX_LAYERS,
    MAX_LINEARS,
    MAX_NAMES,
    Average,
    Bits,
    GroupSize,
    Ids,
    Line,
    LinearBits,
    Name,
    RotationSize,
    SchemeNames,
    Strict,
    Threshold,
    Widths,
)
from vllm_moeq.format.packing import BIT_WIDTHS, CODES_PER_BLOCK
from vllm_moeq.format.problems import first_problem, refuse_crowds
from vllm_moeq.format.rotation import SIGNS, Rotated
from vllm_moeq.format.schemes import GRID, SCHEMES, Scheme

QUANT_METHOD = "moeq"
FORMAT_VERSIONS = (1, 2)
"""The versions that are read. The lowest one that can say what a checkpoint holds is written."""

MORE_KEYS = {"linear.widths": MAX_LINEARS}
"""Place of an object in a ``quantization_config`` → its largest number of keys, where that is not ``MAX_LAYERS``."""


class Projections(Strict):
    """The names of an expert's matrices in the checkpoint: down(act(gate(x)) · up(x)), or without ``up``."""

    gate: Name
    up: Name | None = None
    down: Name

    def names(self) -> tuple[str, ...]:
        """Return the names of gate, up (if there is one) and down."""
        return (self.gate, self.down) if self.up is None else (self.gate, self.up, self.down)


class Linear(Strict):
    """How the linears outside the routed experts are stored.

    With 4 and 8 bits they have compressed-tensors' ``pack-quantized`` form, symmetric, with one scale per group; vLLM
    serves them with its own kernels. With 16 bits they are stored as in the source.

    Attributes:
        bits: the width of every linear that ``widths`` does not name.
        group_size: weights per scale along the input dimension, for all widths.
        widths: name of a linear, without ``.weight`` → its width. A checkpoint's config names only packed linears
            whose width differs from ``bits``; settings may name any, with 16 bits too (:meth:`stored`).
    """

    bits: LinearBits
    group_size: Annotated[int, Field(ge=CODES_PER_BLOCK, le=1 << 20, multiple_of=CODES_PER_BLOCK)] = 128
    widths: Annotated[dict[Name, LinearBits], Field(max_length=MAX_LINEARS)] = Field(default_factory=dict)

    @property
    def choices(self) -> tuple[int, ...]:
        """The widths that linears have, smallest first."""
        return tuple(sorted({self.bits, *self.widths.values()}))

    def bits_of(self, name: str) -> int:
        """Return the width of one linear.

        Args:
            name: the linear's name, with or without ``.weight``.
        """
        return self.widths.get(name.removesuffix(".weight"), self.bits)

    def alone(self, name: str) -> Linear:
        """Return the format of one linear: its width is ``bits``, and ``widths`` is empty.

        Args:
            name: the linear's name, with or without ``.weight``.
        """
        return self.of_width(self.bits_of(name))

    def of_width(self, bits: int) -> Linear:
        """Return the format of linears that all have this width."""
        return self.model_copy(update={"bits": bits, "widths": {}})

    def stored(self, names: Iterable[str]) -> Linear:
        """Return the same widths as a config says them: the most frequent packed width is ``bits``.

        Linears of 16 bits are not named, because ``unquantized`` names them.

        Args:
            names: names of all linears outside the experts, with or without ``.weight``.
        """
        found = {name.removesuffix(".weight"): self.bits_of(name) for name in names}
        packed = {name: bits for name, bits in found.items() if bits != 16}
        counts = Counter(packed.values())
        # Without any packed linear, ``bits`` of a model that has none stays what was asked for.
        most = min(counts, key=lambda bits: (-counts[bits], bits)) if packed else 16 if found else self.bits
        widths = {name: bits for name, bits in packed.items() if bits != most}
        return self.model_copy(update={"bits": most, "widths": widths})

    @model_serializer(mode="wrap")
    def _without_empty_widths(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``widths`` out where it is empty, as format version 1 has no such key."""
        values: dict[str, Any] = handler(self)
        return values if self.widths else {key: value for key, value in values.items() if key != "widths"}

    def compressed_tensors(self) -> dict[str, Any]:
        """Return the equivalent configuration for vLLM's compressed-tensors method, for linears of ``bits`` bits."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": [],
        }


class Rotation(Strict):
    """The sizes of the blocks that a layer's activations are rotated by, see :mod:`vllm_moeq.format.rotation`.

    Attributes:
        input: of the input of gate and up; it divides the hidden size.
        inner: of the input of down; it divides the intermediate size.
    """

    input: RotationSize
    inner: RotationSize


class PlanSummary(Strict):
    """The origin of the widths, for people and reports; no kernel reads it."""

    method: Line
    avg_bits: Average
    achieved_avg_bits: Average
    bit_choices: Annotated[list[Bits], Field(fail_fast=True, min_length=1, max_length=len(BIT_WIDTHS))]
    zeta: Annotated[float, Field(ge=1)] | None = None
    promotion: Literal["official", "stable"] | None = None
    counts: Literal["paper", "official"] | None = None
    quantizer: Line | None = None
    fallback: Annotated[dict[Name, Ids], Field(max_length=MAX_LAYERS)] | None = None


class MoeqConfig(Strict):
    """A checkpoint's ``quantization_config``: explicit widths for every expert of every MoE layer."""

    quant_method: Literal["moeq"]
    format_version: Literal[1, 2]
    group_size: GroupSize
    projections: Projections
    experts: Annotated[dict[Name, Widths], Field(min_length=1, max_length=MAX_LAYERS)]
    linear: Linear
    unquantized: Annotated[list[Name], Field(fail_fast=True, max_length=MAX_NAMES)]
    plan: PlanSummary
    odp: Annotated[dict[Name, Threshold], Field(max_length=MAX_LAYERS)] | None = None
    schemes: Annotated[dict[Name, SchemeNames], Field(max_length=MAX_LAYERS)] | None = None
    rotation: Rotation | None = None

    def scheme(self, prefix: str, expert: int) -> Scheme:
        """Return the scheme of an expert's matrices.

        Args:
            prefix: the layer's key in ``experts``.
            expert: the expert's index within the layer.
        """
        names = (self.schemes or {}).get(prefix)
        return SCHEMES[names[expert] if names else GRID.name]

    def rotated(self, prefix: str, projection: str) -> Rotated | None:
        """Return the rotation in whose basis a matrix is stored, or None.

        Args:
            prefix: the layer's key in ``experts``.
            projection: the matrix's name in the checkpoint.
        """
        if self.rotation is None:
            return None
        down = projection == self.projections.down
        beside = self.projections.down if down else self.projections.gate
        return Rotated(f"{prefix}.0.{beside}.{SIGNS}", self.rotation.inner if down else self.rotation.input)

    def signs(self) -> list[str]:
        """Return the names of all layers' signs."""
        both = (self.projections.gate, self.projections.down)
        found = [self.rotated(prefix, projection) for prefix in self.experts for projection in both]
        return [rotated.name for rotated in found if rotated is not None]

    @model_validator(mode="after")
    def _keys_agree(self) -> MoeqConfig:
        linear, experts = self.linear, self.experts
        check_projections(self.projections.names())
        check_linears(linear.bits, linear.widths, self.unquantized, experts)
        check_schemes(self.schemes, experts)
        # One version for one content: a reader knows by the number whether it can read a checkpoint.
        needed = version_for(linear, self.schemes, self.rotation)
        if self.format_version != needed:
            why = "linear.widths, schemes or rotation is there" if needed == 2 else "no key needs a later one"
            raise ValueError(f"format_version: expected {needed}, as {why}, found {self.format_version}")
        check_choices(self.plan.bit_choices, experts)
        check_fallback(self.plan.fallback, experts)
        check_thresholds(self.odp, experts)
        return self


def version_for(
    linear: Linear, schemes: Mapping[str, Sequence[str]] | None = None, rotation: Rotation | None = None
) -> Literal[1, 2]:
    """Return the lowest format version that can say how a checkpoint is stored.

    Args:
        linear: the format of linears, as :meth:`Linear.stored` returns it.
        schemes: the schemes of layers that do not have grids alone.
        rotation: the rotation of activations.
    """
    return 2 if linear.widths or schemes or rotation else 1


def parse_config(data: Any, where: str) -> MoeqConfig:
    """Validate a ``quantization_config`` dictionary.

    Args:
        data: the parsed JSON value.
        where: its name in error messages, usually the file's path.

    Raises:
        ConfigError: the method or the format version is unknown, or the value violates the schema.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: quantization_config must be an object, found {type(data).__name__}")
    method = data.get("quant_method")
    if method != QUANT_METHOD:
        raise ConfigError(f"{where}: quant_method must be {QUANT_METHOD!r}, found {method!r:.80}")
    version = data.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise ConfigError(
            f"{where}: format_version must be {' or '.join(map(str, FORMAT_VERSIONS))}, found {version!r:.80}; "
            "a newer version of vllm-moeq may know it"
        )
    refuse_crowds(data, where, MAX_LAYERS, MORE_KEYS)
    try:
        return MoeqConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error)}") from None

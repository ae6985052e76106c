"""plan.json: one width per expert, with the scores and settings behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from planner.model.layout import Layout
from planner.output.files import validated, write_json
from vllm_moeq.format import BIT_WIDTHS, SCHEMES, ConfigError, PlanSummary, read_json, split_width
from vllm_moeq.format.fields import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_LINEARS,
    Average,
    Bits,
    Ids,
    Line,
    LinearBits,
    Name,
    SchemeNames,
    Strict,
    Widths,
)

IMPORTED = "imported"
"""Method in the plan of a checkpoint that another program quantized."""

LATER = ("linears", "schemes")
"""Keys that plans of version 1 have had only since some release."""

Scores = Annotated[list[float], Field(fail_fast=True, max_length=MAX_EXPERTS)]


class PlanSettings(Strict):
    """The flags that shaped the plan; a flag that the method does not use is null."""

    zeta: Annotated[float, Field(ge=1)] | None = None
    promotion: Literal["official", "stable"] | None = None
    counts: Literal["paper", "official"] | None = None
    ranking: Literal["layer", "global"] | None = None
    seed: Annotated[int, Field(lt=1 << 64)] | None = None
    initial_model: str | None = None
    stats: str | None = None
    quantizer: str | None = None
    budget_gib: float | None = None
    overrides: dict[str, Bits] = Field(default_factory=dict)


class Plan(Strict):
    """The contents of plan.json, version 1.

    Attributes:
        order: a layer's experts, highest precision first.
        promoted: a layer's experts that MaxVar moved up.
        linears: name of a linear outside the experts, without ``.weight`` → its width: of all linears, or empty where
            the plan leaves them to ``--linear-bits``.
        schemes: the schemes of a layer's experts: of all layers, or empty where the plan leaves them to ``--scheme``.
        near_ties: neighbours in the order whose first score differs by at most one part in a million.
    """

    version: Literal[1]
    method: Line
    bit_choices: Annotated[list[Bits], Field(fail_fast=True, min_length=1, max_length=len(BIT_WIDTHS))]
    avg_bits: Average
    achieved_avg_bits: Average
    experts: Annotated[dict[Name, Widths], Field(min_length=1, max_length=MAX_LAYERS)]
    linears: Annotated[dict[Name, LinearBits], Field(max_length=MAX_LINEARS)] = Field(default_factory=dict)
    schemes: Annotated[dict[Name, SchemeNames], Field(max_length=MAX_LAYERS)] = Field(default_factory=dict)
    order: dict[Name, Ids] = Field(default_factory=dict)
    scores: dict[Name, dict[Name, Scores]] = Field(default_factory=dict)
    promoted: dict[Name, Ids] = Field(default_factory=dict)
    near_ties: dict[Name, list[Ids]] = Field(default_factory=dict)
    settings: PlanSettings = Field(default_factory=PlanSettings)
    source: dict[str, Line] = Field(default_factory=dict)
    cost: dict[str, float] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_what_is_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave :data:`LATER` out where they are empty: then readers that do not know them take the plan too."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value or key not in LATER}

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        choices = set(self.bit_choices)
        for prefix, widths in self.experts.items():
            for expert, bits in enumerate(widths):
                if bits not in choices:
                    raise ValueError(
                        f"{prefix}: expert {expert} has {bits} bits, which is not among bit_choices {sorted(choices)}"
                    )
            order = self.order.get(prefix)
            if order is not None and sorted(order) != list(range(len(widths))):
                raise ValueError(f"{prefix}: order is no permutation of {len(widths)} experts")
        return self

    @model_validator(mode="after")
    def _schemes_fit(self) -> Plan:
        for prefix in self.experts if self.schemes else ():
            if prefix not in self.schemes:
                raise ValueError(f"schemes: {prefix}: expected the schemes of its experts, found none")
        for prefix, names in self.schemes.items():
            widths = self.experts.get(prefix, [])
            if len(names) != len(widths):
                raise ValueError(f"schemes: {prefix}: expected {len(widths)} names, found {len(names)}")
            for expert, (name, bits) in enumerate(zip(names, widths, strict=True)):
                able = [scheme.name for scheme in SCHEMES.values() if bits in scheme.widths]
                if name not in able:
                    wanted = " or ".join(able)
                    raise ValueError(f"schemes: {prefix}: expert {expert}: expected {wanted}, found {name!r}")
        return self

    def summary(self, quantizer: str) -> PlanSummary:
        """Return the part for the checkpoint's config.json."""
        return PlanSummary(
            method=self.method,
            avg_bits=self.avg_bits,
            achieved_avg_bits=self.achieved_avg_bits,
            bit_choices=self.bit_choices,
            zeta=self.settings.zeta,
            promotion=self.settings.promotion,
            counts=self.settings.counts,
            quantizer=quantizer,
        )

    def write(self, path: Path) -> None:
        """Write plan.json atomically."""
        write_json(path, self.model_dump(mode="json"))

    def check_against(self, layout: Layout, where: str) -> None:
        """Check that the plan has exactly the model's MoE layers and experts, and all linears or none.

        Raises:
            ConfigError: a layer or a linear is missing or unknown, a layer has another number of experts, or linears
                that vLLM joins have several widths.
        """
        expected = {layer.prefix: layer.num_experts for layer in layout.layers}
        for prefix, count in expected.items():
            found = len(self.experts.get(prefix, []))
            if found != count:
                raise ConfigError(f"{where}: {prefix}: expected {count} widths, found {found}")
        for prefix in self.experts:
            if prefix not in expected:
                raise ConfigError(f"{where}: {prefix}: the model has no such MoE layer")
        self._check_linears(layout, where)

    def _check_linears(self, layout: Layout, where: str) -> None:
        if not self.linears:
            return
        names = dict.fromkeys(name.removesuffix(".weight") for name in layout.linears)
        for name in names:
            if name not in self.linears:
                raise ConfigError(f"{where}: linears: {name}: expected a width, found none")
        for name in self.linears:
            if name not in names:
                raise ConfigError(f"{where}: linears: {name}: the model has no such linear outside its experts")
        if (reason := split_width(self.linears)) is not None:
            raise ConfigError(f"{where}: linears: {reason}")


def read_plan(path: Path) -> Plan:
    """Read and validate plan.json.

    Raises:
        ConfigError: the file is invalid; the message names it and the first violation.
    """
    data = read_json(path)
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version != 1:
        raise ConfigError(f"{path}: expected a plan of version 1, found {version!r:.80}")
    return validated(path, data, Plan)

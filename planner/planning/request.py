"""The options of a plan: defaults, checks, the overrides file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from planner.model.layout import Layout
from planner.planning.method import Method
from planner.planning.methods import METHODS, OURS, PAPER
from planner.quantization.quantizers.table import (
    AUTO_SCHEME,
    DEFAULT,
    POSSIBLE,
    QUANTIZERS,
    SchemeChoice,
    calibrated_names,
    check_widths,
)
from vllm_moeq.format import BIT_WIDTHS, SCHEMES, ConfigError, UsageError, read_json


@dataclass(frozen=True)
class LinearChoice:
    """The linears outside the experts get a width each, from the same bytes as the experts.

    Attributes:
        linear_group_size: weights of linears per scale.
        quantizer: name of the quantizer of linears.
    """

    linear_group_size: int
    quantizer: str


@dataclass(frozen=True)
class PlanOptions:
    """The options of a plan, named after their flags; :func:`check_options` checks them.

    Attributes:
        ranking: scope of the ranking; None takes the method's own.
        ranked: False skips scores and order and assigns widths by index, for estimates from headers alone.
        calibrated: a text is given, so that statistics will follow.
        linears: how linears outside the experts compete with experts; None if the plan gives them no widths.
        scheme: the scheme of experts, or ``auto``.
        group_size: weights per scale of a grid, or −1 for whole rows.
        trellis_bits: with ``auto`` and a budget, the average that the budget allows with trellises.
    """

    avg_bits: Fraction
    bit_choices: tuple[int, ...]
    method: str = "auto"
    zeta: float = 3.0
    promotion: str = "official"
    counts: str = "paper"
    ranking: str | None = None
    initial_model: Path | None = None
    stats: Path | None = None
    temporary_stats: bool = False
    budget_gib: float | None = None
    overrides: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    quantizer: str = DEFAULT
    ranked: bool = True
    calibrated: bool = False
    linears: LinearChoice | None = None
    scheme: SchemeChoice = "grid"
    group_size: int = 128
    trellis_bits: Fraction | None = None

    @property
    def filled_by_average(self) -> bool:
        """Whether the average alone keeps the plan within a budget of bytes."""
        return self.budget_gib is not None and self.linears is None

    @property
    def expert_measures(self) -> tuple[str, ...]:
        """The measures of experts that the method needs for the scheme."""
        method = METHODS[self.resolved_method]
        return (*method.measures, *method.other_measures(self.scheme))

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that the method needs, rows of ``planner.calibration.measures.MEASURES``."""
        method = METHODS[self.resolved_method]
        own = (method.linears,) if self.linears is not None and method.linears is not None else ()
        return (*self.expert_measures, *own)

    @property
    def resolved_method(self) -> str:
        """The method's name; ``auto`` is replaced by the method that it chooses."""
        return resolved_method(self.method, self.stats is not None or self.calibrated)


def resolved_method(name: str, calibrated: bool) -> str:
    """Return the method that ``auto`` chooses with or without calibration; keep other names."""
    return (OURS if calibrated else PAPER) if name == "auto" else name


def check_choices(bit_choices: Sequence[int], flag: str = "--bits") -> tuple[int, ...]:
    """Return the widths in ascending order.

    Raises:
        UsageError: there are no widths, a width is repeated, or the format does not have it.
    """
    for bits in bit_choices:
        if bits not in BIT_WIDTHS:
            raise UsageError(f"{flag}: expected widths among {', '.join(map(str, BIT_WIDTHS))}, found {bits}")
    if not bit_choices or len(set(bit_choices)) != len(bit_choices):
        raise UsageError(f"{flag}: expected distinct widths, found {list(bit_choices)}")
    return tuple(sorted(bit_choices))


def check_options(options: PlanOptions) -> None:
    """Check that the options can be met.

    Raises:
        UsageError: an option cannot be met; the message names its flag.
    """
    low, high = min(options.bit_choices), max(options.bit_choices)
    if not low <= options.avg_bits <= high:
        raise UsageError(
            f"--avg-bits: expected a value between {low} and {high} (--bits), found {float(options.avg_bits):g}"
        )
    if options.resolved_method not in METHODS:
        known = ", ".join(["auto", *METHODS])
        raise UsageError(f"--method: expected one of {known}, found {options.method}")
    method, average = METHODS[options.resolved_method], options.avg_bits
    if method.one_width and average not in options.bit_choices:
        raise UsageError(
            f"--method {options.resolved_method}: expected --avg-bits to be one of --bits, found {float(average):g}"
        )
    if options.linears is not None:
        _check_linears(options, method)
    if options.scheme == AUTO_SCHEME:
        _check_auto_scheme(options, method)
    check_widths(options.quantizer, options.bit_choices)
    _check_scheme_widths(options)
    if not 1 <= options.zeta < math.inf:
        raise UsageError(f"--zeta: expected at least 1, found {options.zeta:g}")


def _check_scheme_widths(options: PlanOptions) -> None:
    """Raise UsageError where the scheme that is asked for has none of the widths: all experts would be grids."""
    widths = tuple({bits for name in POSSIBLE[options.scheme] for bits in SCHEMES[name].widths})
    if not set(widths) & set(options.bit_choices):
        raise UsageError(
            f"--scheme {options.scheme}: expected --bits with some of {', '.join(map(str, sorted(widths)))}, "
            f"found {', '.join(map(str, options.bit_choices))}"
        )


def _check_auto_scheme(options: PlanOptions, method: Method) -> None:
    """Raise UsageError where nothing measures what each scheme costs."""
    if method.gains is None or not QUANTIZERS[options.quantizer].calibrated:
        able = " or ".join(name for name, row in METHODS.items() if row.gains is not None)
        raise UsageError(
            f"--scheme {AUTO_SCHEME}: expected --method {able} with --quantizer {' or '.join(calibrated_names())}, "
            f"which measure both schemes, found {options.resolved_method} with {options.quantizer}"
        )


def _check_linears(options: PlanOptions, method: Method) -> None:
    """Raise UsageError where the plan cannot give widths to linears."""
    if method.linears is None:
        able = " or ".join(name for name, row in METHODS.items() if row.linears is not None)
        raise UsageError(
            f"--linear-bits auto: expected --method {able}, which need --data TEXT or --stats FILE, "
            f"found {options.resolved_method}"
        )
    if options.ranking not in (None, "global"):
        raise UsageError(
            f"--linear-bits auto: expected --ranking global, as linears and all experts share one budget, "
            f"found {options.ranking}"
        )


def read_overrides(path: Path, layout: Layout, choices: Sequence[int]) -> dict[str, int]:
    """Read ``{"<experts prefix>.<expert>": width}``.

    Raises:
        ConfigError: see :func:`check_overrides`.
    """
    return check_overrides(read_json(path), str(path), layout, choices)


def check_overrides(data: Any, where: str, layout: Layout, choices: Sequence[int]) -> dict[str, int]:
    """Return fixed widths of a model's experts.

    Args:
        data: expert name → width, if it is right.
        where: its name in messages.
        layout: the model's layers.
        choices: the widths to choose from.

    Raises:
        ConfigError: no object, an expert is unknown, or a width is not among the choices.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object of expert name → width, found {type(data).__name__}")
    known = {f"{layer.prefix}.{expert}" for layer in layout.layers for expert in range(layer.num_experts)}
    for name, bits in data.items():
        if name not in known:
            example = f"{layout.layers[0].prefix}.0"
            raise ConfigError(f"{where}: {name:.200}: the model has no such expert (names look like {example})")
        if type(bits) is not int or bits not in choices:
            raise ConfigError(f"{where}: {name}: expected a width among --bits {sorted(choices)}, found {bits!r:.80}")
    return data

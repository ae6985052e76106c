"""Collect the facts about a checkpoint from its folder, for report and card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.common.units import layer_number
from planner.evaluation.record import Evaluations, read_evaluations
from planner.plan_file import IMPORTED, Plan, read_plan
from planner.quantization.record import Recorded, printable, read_recorded
from vllm_moeq.format import (
    GRID,
    ConfigError,
    MoeqConfig,
    ShardSet,
    expert_matrices,
    load_config,
    read_config_json,
    verify,
)
from vllm_moeq.format.files import check_inside
from vllm_moeq.format.linears import WORDS

HALF = 2
"""Bytes per weight in 16 bits."""


@dataclass(frozen=True)
class LayerFacts:
    """One MoE layer.

    Attributes:
        prefix: prefix of the experts' names.
        label: the layer's number, with the stack's name if numbers alone are ambiguous.
        widths: bits per expert.
        promoted: indices of experts that MaxVar moved to a larger width.
        fallbacks: index of an expert that was not quantized as requested → reason.
        schemes: name of each expert's scheme.
    """

    prefix: str
    label: str
    widths: tuple[int, ...]
    promoted: frozenset[int]
    fallbacks: Mapping[int, str]
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A share of the checkpoint's bytes. ``bits`` is the width of expert codes; None for all other tensors."""

    title: str
    bytes: int
    bits: int | None = None


@dataclass(frozen=True)
class CheckpointSizes:
    """Bytes of a checkpoint's tensors.

    Attributes:
        parts: the bytes by part.
        half_precision: bytes of the same tensors in 16 bits.
        source: bytes of the source's tensors; None if they are not recorded.
    """

    parts: tuple[Part, ...]
    half_precision: int
    source: int | None

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(part.bytes for part in self.parts)

    @property
    def before(self) -> int:
        """Bytes that the checkpoint is compared with: the source's if they are recorded, else those in 16 bits."""
        return self.source or self.half_precision

    @property
    def ratio(self) -> float:
        """Ratio of the size before to the checkpoint's size."""
        return self.before / self.total


@dataclass(frozen=True)
class Facts:
    """The facts about a checkpoint.

    Attributes:
        folder: the checkpoint's folder; its path is never shown.
        model: contents of config.json.
        config: moeq's part of config.json.
        plan: contents of plan.json; None without the file.
        recorded: contents of quantization_report.json; empty without the file.
        evaluations: contents of evaluation.json; empty without the file.
        layers: the MoE layers.
        sizes: bytes of the tensors.
        average_bits: average bits per expert weight.
    """

    folder: Path
    model: dict[str, Any]
    config: MoeqConfig
    plan: Plan | None
    recorded: Recorded
    evaluations: Evaluations
    layers: tuple[LayerFacts, ...]
    sizes: CheckpointSizes
    average_bits: float

    @property
    def name(self) -> str | None:
        """The source's name; None if it is not recorded."""
        return self.recorded.source.name if self.recorded.source else None

    @property
    def folder_name(self) -> str:
        """The folder's name without its path."""
        return printable(self.folder.resolve().name)

    @property
    def model_type(self) -> str:
        """``model_type`` in config.json."""
        return str(self.model.get("model_type", "unknown architecture"))

    @property
    def imported(self) -> bool:
        """Whether another program quantized it."""
        return self.config.plan.method == IMPORTED

    @property
    def widths(self) -> dict[int, int]:
        """Width → number of experts, ascending."""
        return dict(sorted(Counter(bits for layer in self.layers for bits in layer.widths).items()))

    @property
    def kinds(self) -> dict[tuple[int, str], int]:
        """(width, scheme) → number of experts, ascending."""
        pairs = (pair for layer in self.layers for pair in zip(layer.widths, layer.schemes, strict=True))
        return dict(sorted(Counter(pairs).items()))

    @property
    def grids_alone(self) -> bool:
        """Whether no expert has another scheme than the grid."""
        return all(name == GRID.name for _, name in self.kinds)

    @property
    def num_experts(self) -> int:
        """Number of experts of all layers together."""
        return sum(len(layer.widths) for layer in self.layers)

    @property
    def most_experts(self) -> int:
        """Number of experts of the largest layer."""
        return max(len(layer.widths) for layer in self.layers)

    @property
    def num_promoted(self) -> int:
        """Number of experts that MaxVar moved to a larger width."""
        return sum(len(layer.promoted) for layer in self.layers)

    @property
    def num_fallbacks(self) -> int:
        """Number of experts that were not quantized as requested."""
        return sum(len(layer.fallbacks) for layer in self.layers)


def collect(folder: Path) -> Facts:
    """Read a checkpoint's headers and JSON files.

    Raises:
        MoeqError: no moeq checkpoint, damaged headers or JSON, a plan whose widths differ from config.json.
    """
    average_bits = verify(folder, values=False).average_bits
    config, recorded = load_config(folder), read_recorded(folder)
    path = folder / "plan.json"
    check_inside(path)
    plan = read_plan(path) if path.exists() else None
    if plan is not None and plan.experts != config.experts:
        raise ConfigError(f"{path}: expected the widths of config.json, found others")
    with ShardSet(folder) as shards:
        sizes = _sizes(shards, config, recorded)
    return Facts(
        folder=folder,
        model=read_config_json(folder / "config.json"),
        config=config,
        plan=plan,
        recorded=recorded,
        evaluations=read_evaluations(folder),
        layers=_layers(config, plan, recorded),
        sizes=sizes,
        average_bits=average_bits,
    )


def _layers(config: MoeqConfig, plan: Plan | None, recorded: Recorded) -> tuple[LayerFacts, ...]:
    found = []
    for prefix, label in zip(config.experts, _labels(list(config.experts)), strict=True):
        fallbacks = dict.fromkeys((config.plan.fallback or {}).get(prefix, ()), "reason not recorded")
        fallbacks |= {index: it.fallback for index, it in recorded.experts(prefix).items() if it.fallback is not None}
        promoted = plan.promoted.get(prefix, ()) if plan else ()
        schemes = tuple(config.scheme(prefix, expert).name for expert in range(len(config.experts[prefix])))
        found.append(LayerFacts(prefix, label, tuple(config.experts[prefix]), frozenset(promoted), fallbacks, schemes))
    return tuple(found)


def _labels(prefixes: Sequence[str]) -> list[str]:
    """Return the layers' numbers; if two stacks share numbers, add the stacks' names."""
    numbers = [layer_number(prefix) for prefix in prefixes]
    if len(set(numbers)) == len(numbers):
        return numbers
    return [f"{prefix.split('.')[0]} {number}" for prefix, number in zip(prefixes, numbers, strict=True)]


def _sizes(shards: ShardSet, config: MoeqConfig, recorded: Recorded) -> CheckpointSizes:
    codes: Counter[int] = Counter()
    metadata = half = 0
    names: set[str] = set()
    for matrix in expert_matrices(shards, config):
        first, *beside = (shards.info(name).nbytes for name in matrix.names() if name not in names)
        codes[matrix.bits] += first
        metadata += sum(beside)
        half += HALF * matrix.weights
        names.update(matrix.names())
    kept = 0
    linears: Counter[int] = Counter()
    for name, info in shards.tensors.items():
        base, _, suffix = name.rpartition(".")
        if name in names:
            continue
        if f"{base}.{WORDS}" in shards.tensors and suffix.startswith("weight_"):
            bits = config.linear.bits_of(base)
            linears[bits] += info.nbytes
            half += HALF * info.numel * 32 // bits if suffix == WORDS else 0
        else:
            kept += info.nbytes
    parts = [Part(f"experts of {bits} bit{'s' if bits > 1 else ''}", codes[bits], bits) for bits in sorted(codes)]
    signs = ", and signs of the rotation" if config.rotation is not None else ""
    parts.append(Part(f"experts’ scales and zero points{signs}", metadata))
    parts += [Part(f"other linears, {bits} bits", linears[bits]) for bits in sorted(linears)]
    parts.append(Part("routers, embeddings, norms and other tensors, as in the source", kept))
    return CheckpointSizes(tuple(parts), half + kept, recorded.source.bytes if recorded.source else None)

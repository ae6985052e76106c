"""Sizes from headers alone: the bytes of a plan's checkpoint, and the average width that fits a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from planner.common.units import GIB
from planner.model.layout import Layout, MoeLayer
from planner.model.source import SourceModel
from vllm_moeq.format import GRID, SCHEMES, Linear, Scheme, TensorInfo, UsageError
from vllm_moeq.format.rotation import rotation_size

SHAPE_BYTES = 16
"""Bytes of the shape that a packed linear stores."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the source's tensors and of the quantized checkpoint's, by kind.

    ``largest_shard_bytes`` counts the largest shard: one decoder layer, or all tensors outside the layers.
    """

    source_bytes: int
    expert_bytes: int
    linear_bytes: int
    kept_bytes: int
    largest_shard_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors: on disk, and in memory when the checkpoint is served."""
        return self.expert_bytes + self.linear_bytes + self.kept_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the total, for ``--json``."""
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Storage:
    """How experts are stored.

    Attributes:
        scheme: the scheme of the widths that it has; the others are grids.
        rotated: whether layers have signs of a rotation.
        chosen: experts prefix → name of each expert's scheme, where a plan says it.
    """

    scheme: Scheme = GRID
    rotated: bool = False
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def scheme_of(self, bits: int) -> Scheme:
        """Return the scheme of experts of a width where no plan says it."""
        return self.scheme if bits in self.scheme.widths else GRID

    def schemes(self, prefix: str, widths: Sequence[int]) -> list[Scheme]:
        """Return the scheme of each expert of a layer."""
        names = self.chosen.get(prefix) if self.rotated else None
        return [self.scheme_of(bits) for bits in widths] if names is None else [SCHEMES[name] for name in names]

    def all_schemes(self, experts: Mapping[str, Sequence[int]]) -> list[Scheme]:
        """Return the schemes of all experts (experts prefix → bits per expert), each once."""
        found = (scheme for prefix, widths in experts.items() for scheme in self.schemes(prefix, widths))
        return list(dict.fromkeys(found))

    def shared_bytes(self, layer: MoeLayer) -> int:
        """Return the bytes that a layer's experts share: a sign for each input of gate and up, and of down."""
        inputs = [layer.shapes[name][1] for name in (layer.projections.gate, layer.projections.down)]
        return sum(inputs) // 8 if self.rotated else 0

    def slice_step(self, layer: MoeLayer) -> int:
        """Return what a rank's part of a layer's intermediate size is a multiple of, where ranks split experts."""
        schemes = {GRID, self.scheme, *(SCHEMES[name] for name in self.chosen.get(layer.prefix, ()) if self.rotated)}
        steps = [number for scheme in schemes for number in (scheme.row_step, scheme.column_step)]
        turned = rotation_size(layer.shapes[layer.projections.down][1]) if self.rotated else None
        return math.lcm(*steps, turned or 1)


GRIDS = Storage()


def expert_bytes(layer: MoeLayer, bits: int, group_size: int, scheme: Scheme = GRID) -> int:
    """Return the bytes of one expert of a width, in bits."""
    return sum(scheme.nbytes(rows, columns, bits, group_size) for rows, columns in layer.shapes.values())


def layer_bytes(layer: MoeLayer, widths: Sequence[int], group_size: int, storage: Storage = GRIDS) -> int:
    """Return the bytes of a layer's quantized experts."""
    kinds = Counter(zip(widths, storage.schemes(layer.prefix, widths), strict=True))
    experts = sum(count * expert_bytes(layer, bits, group_size, scheme) for (bits, scheme), count in kinds.items())
    return experts + storage.shared_bytes(layer)


def stored_bytes(info: TensorInfo, linear: Linear) -> int:
    """Return the bytes of one linear that is not an expert, in the format ``linear``, see :meth:`Linear.alone`."""
    if linear.bits == 16:
        return info.nbytes
    scales = info.shape[0] * math.ceil(info.shape[1] / linear.group_size)
    return info.numel * linear.bits // 8 + 2 * scales + SHAPE_BYTES


def linear_bytes(model: SourceModel, layout: Layout, linear: Linear) -> int:
    """Return the bytes of all linears that are not experts, in the format ``linear``."""
    return sum(stored_bytes(model.shards.info(name), linear.alone(name)) for name in layout.linears)


def estimate(
    model: SourceModel,
    layout: Layout,
    experts: Mapping[str, Sequence[int]],
    group_size: int,
    linear: Linear,
    storage: Storage = GRIDS,
) -> Sizes:
    """Return the sizes of the checkpoint with the given widths.

    Args:
        model: the source.
        layout: the source's layout.
        experts: experts prefix → bits per expert.
        group_size: expert weights per scale, or −1 for whole rows.
        linear: format of the linears that are not experts.
        storage: how the experts are stored.
    """
    per_layer = [layer_bytes(layer, experts[layer.prefix], group_size, storage) for layer in layout.layers]
    others = {name: stored_bytes(model.shards.info(name), linear.alone(name)) for name in layout.linears}
    kept = {name: model.shards.info(name).nbytes for name in layout.kept}
    shards: Counter[str | None] = Counter(dict(zip((layer.block for layer in layout.layers), per_layer, strict=True)))
    for name, size in (others | kept).items():
        shards[layout.block_of(name)] += size
    return Sizes(
        source_bytes=model.stored_bytes,
        expert_bytes=sum(per_layer),
        linear_bytes=sum(others.values()),
        kept_bytes=sum(kept.values()),
        largest_shard_bytes=max(shards.values()),
    )


def average_for_budget(
    model: SourceModel,
    layout: Layout,
    budget_gib: float,
    bit_choices: Sequence[int],
    group_size: int,
    linear: Linear,
    storage: Storage = GRIDS,
) -> Fraction:
    """Return the largest average width whose checkpoint fits into ``budget_gib``, counting all tensors.

    Raises:
        UsageError: even the smallest width does not fit; the message names the GiB it needs.
    """
    if not 0 < budget_gib < math.inf:
        raise UsageError(f"--budget-gib: expected a positive number, found {budget_gib:g}")
    fixed = linear_bytes(model, layout, linear)
    fixed += sum(model.shards.info(name).nbytes for name in layout.kept)
    taken = {
        bits: fixed + sum(layer_bytes(it, [bits] * it.num_experts, group_size, storage) for it in layout.layers)
        for bits in bit_choices
    }
    low, high = min(bit_choices), max(bit_choices)
    budget = Fraction(str(budget_gib)) * GIB
    if budget < taken[low]:
        codes = sum(layer.weights_per_expert * layer.num_experts for layer in layout.layers) * low / 8
        raise UsageError(
            f"--budget-gib: {low} bits for every expert take {taken[low] / GIB:.4g} GiB "
            f"({(taken[low] - codes) / GIB:.4g} GiB of it not expert codes), found {budget_gib:g}"
        )
    # A width of another scheme may take more for a bit than the others; all bits may be spent on it.
    steps = [Fraction(taken[bits] - taken[low], bits - low) for bits in bit_choices if bits > low]
    average = low + (budget - taken[low]) / max(steps) if steps else Fraction(low)
    # Six decimals, rounded down: plan.json stores the average as a decimal number.
    return min(Fraction(math.floor(average * 10**6), 10**6), Fraction(high))

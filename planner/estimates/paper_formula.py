"""Compute sizes by the formula of the paper's Table 1, beside our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from planner.model.architectures import EMBEDDINGS
from planner.model.layout import Layout
from planner.model.sizes import GRIDS, Sizes, Storage, estimate
from planner.model.source import SourceModel
from vllm_moeq.format import Linear

STORED_BITS = {3: Fraction(32, 10)}
"""Width → stored bits per code in the paper's files, if larger than the width: 32 bits hold ten 3-bit codes."""

PAPER_LINEAR_BITS = 4
PAPER_GROUP_BITS = Fraction(16 + 16, 128)
"""Bits per weight for a 16-bit scale and a 16-bit zero point per group of 128."""


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights by kind.

    Attributes:
        experts: weights of all routed experts.
        linears: weights of attention and other linears that are quantized.
        embeddings: weights of the embedding and the head; tied weights count once.
        rest: weights of routers, norms and biases.
    """

    experts: int
    linears: int
    embeddings: int
    rest: int

    @property
    def total(self) -> int:
        """Number of all weights."""
        return self.experts + self.linears + self.embeddings + self.rest


def count_weights(model: SourceModel, layout: Layout) -> WeightCounts:
    """Count a model's weights by kind."""
    numbers = {name: info.numel for name, info in model.shards.tensors.items()}
    embeddings = sum(numbers[name] for name in layout.kept if name.endswith(EMBEDDINGS))
    return WeightCounts(
        experts=sum(layer.weights_per_expert * layer.num_experts for layer in layout.layers),
        linears=sum(numbers[name] for name in layout.linears),
        embeddings=embeddings,
        rest=sum(numbers[name] for name in layout.kept) - embeddings,
    )


def paper_bytes(layout: Layout, counts: WeightCounts, experts: Mapping[str, Sequence[int]]) -> int:
    """Return the bytes by the formula that fits Table 1 of the paper (its "GB" are GiB).

    The formula is P_exp·(b̃ + 0.25)/8 + P_attn·4.25/8 + 2·(P_embed + P_head). b̃ is the experts' average width; a 3-bit
    code counts as 3.2 bits. The formula always uses the paper's settings: groups of 128, linears of 4 bits, routers and
    norms not counted. The paper has no widths of 4 and 8 bits; they fill 32-bit words exactly and count unchanged.

    Args:
        layout: the model's layout.
        counts: the model's numbers of weights.
        experts: layer's prefix → width of each expert in bits.
    """
    bits = Fraction(0)
    for layer in layout.layers:
        stored = sum((STORED_BITS.get(width, Fraction(width)) for width in experts[layer.prefix]), Fraction(0))
        bits += layer.weights_per_expert * (stored + PAPER_GROUP_BITS * layer.num_experts)
    bits += counts.linears * (PAPER_LINEAR_BITS + PAPER_GROUP_BITS)
    return round(bits / 8 + 2 * counts.embeddings)


@dataclass(frozen=True)
class ConfigSizes:
    """A model's numbers of weights and its bytes: in bfloat16, quantized by us, and by the paper's formula."""

    counts: WeightCounts
    bf16_bytes: int
    ours: Sizes
    paper_bytes: int


def config_sizes(
    model: SourceModel,
    layout: Layout,
    experts: Mapping[str, Sequence[int]],
    group_size: int,
    linear: Linear,
    storage: Storage = GRIDS,
) -> ConfigSizes:
    """Return the sizes of a model with the given widths, from names and shapes alone.

    Our sizes come from :func:`planner.model.sizes.estimate`. An expert matrix takes N·K·b/8 bytes and 4 bytes per
    group. The format ``linear`` decides the bytes of other linears.

    Args:
        model: the model, with or without weights.
        layout: the model's layout.
        experts: layer's prefix → width of each expert in bits.
        group_size: expert weights per scale, or −1 for whole rows.
        linear: format of the linears that are not experts.
        storage: how the experts are stored.
    """
    counts = count_weights(model, layout)
    return ConfigSizes(
        counts=counts,
        bf16_bytes=2 * counts.total,
        ours=estimate(model, layout, experts, group_size, linear, storage),
        paper_bytes=paper_bytes(layout, counts, experts),
    )

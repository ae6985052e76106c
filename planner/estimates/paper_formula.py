"""Sizes as the paper's Table 1 counts them, beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from planner.model.architectures import EMBEDDINGS
from planner.model.layout import Layout
from planner.model.sizes import Sizes, estimate
from planner.model.source import SourceModel
from vllm_moeq.format import Linear

STORED_BITS = {3: Fraction(32, 10)}
"""Bits that a code takes in the paper's files where it is more than its width: ten 3-bit codes in 32 bits."""

PAPER_LINEAR_BITS = 4
PAPER_GROUP_BITS = Fraction(16 + 16, 128)
"""Bits per weight of a 16-bit scale and a 16-bit zero in groups of 128."""


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights.

    Attributes:
        experts: of all routed experts.
        linears: of attention and other linears that are quantized.
        embeddings: of the embedding and the head; once where they are tied.
        rest: of routers, norms and biases.
    """

    experts: int
    linears: int
    embeddings: int
    rest: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.experts + self.linears + self.embeddings + self.rest


def count_weights(model: SourceModel, layout: Layout) -> WeightCounts:
    """Count a model's weights by what becomes of them."""
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

    P_exp·(b̃ + 0.25)/8 + P_attn·4.25/8 + 2·(P_embed + P_head), b̃ the experts' average with 3.2 bits for a 3-bit code.
    It is always of the paper's settings: groups of 128, linears of 4 bits, routers and norms not counted. Widths of 4
    and 8 bits, which the paper does not have, fill 32-bit words and count as they are.

    Args:
        layout: of the model.
        counts: its numbers of weights.
        experts: layer's prefix → width of each expert, bits.
    """
    bits = Fraction(0)
    for layer in layout.layers:
        stored = sum((STORED_BITS.get(width, Fraction(width)) for width in experts[layer.prefix]), Fraction(0))
        bits += layer.weights_per_expert * (stored + PAPER_GROUP_BITS * layer.num_experts)
    bits += counts.linears * (PAPER_LINEAR_BITS + PAPER_GROUP_BITS)
    return round(bits / 8 + 2 * counts.embeddings)


@dataclass(frozen=True)
class ConfigSizes:
    """A model's numbers of weights and its bytes: as it is in bfloat16, by us, and by the paper's formula."""

    counts: WeightCounts
    bf16_bytes: int
    ours: Sizes
    paper_bytes: int


def config_sizes(
    model: SourceModel, layout: Layout, experts: Mapping[str, Sequence[int]], group_size: int, linear: Linear
) -> ConfigSizes:
    """Return the sizes of a model whose experts have certain widths, from names and shapes alone.

    Ours are those of :func:`planner.model.sizes.estimate`: N·K·b/8 bytes and 4 per group for an expert matrix, and
    what ``linear`` takes for the others.

    Args:
        model: with weights or without.
        layout: of the model.
        experts: layer's prefix → width of each expert, bits.
        group_size: expert weights per scale, or −1 for whole rows.
        linear: format of the linears that are not experts.
    """
    counts = count_weights(model, layout)
    return ConfigSizes(
        counts=counts,
        bf16_bytes=2 * counts.total,
        ours=estimate(model, layout, experts, group_size, linear),
        paper_bytes=paper_bytes(layout, counts, experts),
    )

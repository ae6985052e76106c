"""These pure functions choose the tokens' experts and the experts' widths, and count the bytes that follow.

Shapes are those of a whole layer on one rank. All random numbers are drawn on the CPU from a seed, so that every device
sees the same routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch


@dataclass(frozen=True)
class Shape:
    """One MoE layer on one rank.

    Attributes:
        experts: experts of the layer.
        top_k: experts per token.
        hidden: model dimension.
        intermediate: inner dimension of one expert on this rank.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int


MODELS = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    "mixtral-8x7b-tp8": Shape(8, 2, 4096, 14336 // 8),
    "qwen3-30b-a3b-tp8": Shape(128, 8, 2048, 768 // 8),
    "deepseek-v3-tp8": Shape(256, 8, 7168, 2048 // 8),
    "tiny": Shape(8, 2, 128, 96),
}
"""Published shapes, their slices under tensor parallelism of 8, and a tiny one to try the program with."""

MIXES: dict[str, tuple[tuple[int, ...], float | None]] = {
    "1,2,3": ((1, 2, 3), 2.5),
    "2,3": ((2, 3), 2.5),
    "3,4": ((3, 4), None),
    "2,4,8": ((2, 4, 8), None),
}
"""Widths of a layer, and the average to come near; None: about as many experts of each width."""

ROUTINGS = ("uniform", "zipf")


def width_counts(widths: Sequence[int], experts: int, average: float | None) -> dict[int, int]:
    """Return how many experts get each width, every width at least one where there are enough experts.

    With an ``average`` the counts whose mean is nearest to it, and among those the most equal ones.
    """
    least = 1 if experts >= len(widths) else 0
    equal = experts / len(widths)
    best: tuple[float, float, tuple[int, ...]] | None = None
    for head in product(range(least, experts + 1), repeat=len(widths) - 1):
        counts = (*head, experts - sum(head))
        if counts[-1] < least:
            continue
        mean = sum(width * count for width, count in zip(widths, counts, strict=True)) / experts
        distance = 0.0 if average is None else abs(mean - average)
        candidate = (distance, sum((count - equal) ** 2 for count in counts), counts)
        best = candidate if best is None else min(best, candidate)
    if best is None:
        raise ValueError(f"no counts of the widths {list(widths)} for {experts} experts")
    return dict(zip(widths, best[2], strict=True))


def spread_widths(counts: dict[int, int]) -> list[int]:
    """Return one width per expert, each width as evenly over the indices as its count allows."""
    experts = sum(counts.values())
    placed = dict.fromkeys(counts, 0)
    result = []
    for position in range(1, experts + 1):
        width = max(counts, key=lambda w: counts[w] * position / experts - placed[w])
        placed[width] += 1
        result.append(width)
    return result


def mix_widths(mix: str, experts: int) -> list[int]:
    """Return the widths of a layer's experts under one of :data:`MIXES`."""
    widths, average = MIXES[mix]
    return spread_widths(width_counts(widths, experts, average))


def nearest_width(average: float, choices: Sequence[int] = (1, 2, 3, 4, 8)) -> int:
    """Return the uniform width nearest to an average; of two equally near ones the wider: 2.5 is 3."""
    return min(choices, key=lambda width: (abs(width - average), -width))


def route(kind: str, tokens: int, shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a routing.

    Args:
        kind: ``uniform``, or ``zipf``: the r-th most popular expert has a score in proportion to 1/r. Which expert
            is the r-th depends on the number of experts alone, so that all calls agree about it.
        tokens: number of tokens.
        shape: the layer's shape.
        seed: the seed of the draw.

    Returns:
        Weights float32 [tokens, top-k], each row summing to 1, and ids int32 [tokens, top-k], distinct in a row.
    """
    if kind not in ROUTINGS:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(shape.experts)
    if kind == "zipf":
        ranks = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(shape.experts)) + 1
        scores = -torch.log(ranks.float())
    noise = torch.rand((tokens, shape.experts), generator=generator).clamp_min(1e-9)
    top = (scores - torch.log(-torch.log(noise))).topk(shape.top_k, dim=-1)
    return torch.softmax(top.values, dim=-1).float(), top.indices.int()


def route_by_frequency(
    frequency: Sequence[float], tokens: int, top_k: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens that together visit each expert exactly as often as measured, to within one visit.

    The visits lie end to end, one expert after the other in random order; token t takes the visits t, t + tokens,
    t + 2·tokens and so on, which are of different experts. Then tokens and places are shuffled. Weights are equal.

    Args:
        frequency: how often each expert was selected, in any unit.
        tokens: number of tokens, of all batches together.
        top_k: distinct experts per token.
        seed: the seed of the draw.

    Raises:
        ValueError: an expert would have to be chosen more than once per token.
    """
    ends = torch.tensor(visit_probability(frequency, top_k), dtype=torch.float64).cumsum(0).mul(tokens).round().long()
    ends[-1] = tokens * top_k
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).clamp(max=tokens)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(counts), generator=generator)
    visits = order.repeat_interleave(counts[order]).view(top_k, tokens).T
    shuffled = visits[torch.randperm(tokens, generator=generator)]
    places = torch.rand((tokens, top_k), generator=generator).argsort(dim=-1)
    ids = shuffled.gather(1, places).int().contiguous()
    return torch.full(ids.shape, 1 / top_k), ids


def visit_probability(frequency: Sequence[float], top_k: int) -> list[float]:
    """Return the probability that a token visits each expert; the sum is top-k."""
    total = sum(frequency)
    share = [top_k * value / total for value in frequency]
    if max(share) > 1:
        raise ValueError(f"an expert that takes {max(share) / top_k:.0%} of the visits cannot be one of top-{top_k}")
    return share


def expert_bytes(width: int, shape: Shape, group_size: int, scale_bytes: int = 2) -> int:
    """Return the bytes of one expert: packed gate, up and down, and a scale and a zero per group."""
    weights = 3 * shape.hidden * shape.intermediate * width // 8
    up_groups, down_groups = -(-shape.hidden // group_size), -(-shape.intermediate // group_size)
    scales = 2 * shape.intermediate * up_groups + shape.hidden * down_groups
    return weights + 2 * scale_bytes * scales


def activation_bytes(tokens: int, shape: Shape, item: int = 2) -> int:
    """Return the least traffic of activations: x read, the hidden ones written and read, the result written."""
    return item * (2 * tokens * shape.hidden + 2 * tokens * shape.top_k * shape.intermediate)


def bytes_moved(bits: Sequence[int], ids: torch.Tensor, shape: Shape, group_size: int, *, scale_bytes: int = 2) -> int:
    """Return the bytes that one call has to move: each touched expert once, and the activations.

    Args:
        bits: width of each expert; 16 without scales is bf16.
        ids: int32 [tokens, top-k].
        shape: the layer's shape.
        group_size: weights per scale.
        scale_bytes: size of a scale and of a zero; 0: there are none.
    """
    touched = [expert for expert in torch.unique(ids).tolist() if expert >= 0]
    weights = sum(expert_bytes(bits[expert], shape, group_size, scale_bytes) for expert in touched)
    return weights + activation_bytes(ids.shape[0], shape)


def expected_bytes(bits: Sequence[int], visit: Sequence[float], tokens: int, shape: Shape, group_size: int) -> float:
    """Return the expected bytes of the experts' weights that a batch of independent tokens touches."""
    return sum(
        (1 - (1 - share) ** tokens) * expert_bytes(width, shape, group_size)
        for width, share in zip(bits, visit, strict=True)
    )

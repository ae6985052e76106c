"""Without looking: the same width for all, or a random order."""

import random

from planner.planning.method import LayerScores, Method, OrderOptions


def _shuffled(_scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return random.Random(options.seed).sample(range(experts), experts)


UNIFORM = Method()
RANDOM = Method(order=_shuffled, random=True)

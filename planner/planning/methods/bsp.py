"""BSP (QuantMoE-Bench, Li et al., 2024): one width per layer, more where a block changes its input's direction more."""

from planner.planning.method import Method, ascending

PREDICTED = Method(measures=("block",), order=ascending("block_score"), scope="global", layerwise=True)
COSINE = Method(measures=("block",), order=ascending("block_cosine"), scope="global", layerwise=True)

"""PMQ of MC-MoE (Huang et al., ICLR 2025): measured errors of single experts, weighted by how much they are used."""

from collections.abc import Sequence

from planner.planning.method import CostTable, LayerScores, Method, Scores

FREQUENCY_POWER, WEIGHT_POWER = 1.0, 1.5
"""α and β, as in its published code."""


def _costs(scores: Scores, widths: Sequence[int]) -> dict[str, CostTable]:
    return {prefix: _layer(found, widths) for prefix, found in scores.items()}


def _layer(scores: LayerScores, widths: Sequence[int]) -> CostTable:
    """Return φ^α · w^β · ε(b), φ and w normalised within the layer."""
    tokens, weights = scores["tokens"], scores["gate_probability"]
    all_tokens, all_weights = sum(tokens) or 1.0, sum(weights) or 1.0
    return [
        [
            (tokens[expert] / all_tokens) ** FREQUENCY_POWER
            * (weights[expert] / all_weights) ** WEIGHT_POWER
            * scores[f"error_{bits}"][expert]
            for bits in widths
        ]
        for expert in range(len(tokens))
    ]


METHOD = Method(observed=("tokens", "gate_probability"), measures=("error",), costs=_costs, kept_widths=2)

"""All allocation methods, one row each."""

from __future__ import annotations

import random
from collections.abc import Sequence

from planner.allocation import rank_experts
from planner.planning.method import (
    ROTATED,
    CostTable,
    LayerScores,
    Method,
    OrderOptions,
    Scores,
    ascending,
    descending,
    gained,
    measured,
)
from planner.sensitivity.spectrum import MATRICES, alpha_costs

PAPER = "router-norm-maxvar"
"""The method that ``auto`` chooses without calibration."""

OURS = "kl"
"""The method that ``auto`` chooses with calibration."""

UNRANKED = Method()
"""Assigns widths by index. It gives the same counts as any ranking and reads no weights."""

FREQUENCY_POWER, WEIGHT_POWER = 1.0, 1.5
"""α and β of PMQ, as in its published code."""


def _paper_order(scores: LayerScores, _experts: int, options: OrderOptions) -> list[int]:
    return rank_experts(scores["router_norm"], scores["max_var"], options.zeta, options.promotion)


def _shuffled(_scores: LayerScores, experts: int, options: OrderOptions) -> list[int]:
    return random.Random(options.seed).sample(range(experts), experts)


def _divergence(measure: str, name: str) -> Method:
    """Return a method that spends one budget over the experts of all layers, by KL divergence.

    Its widths include four bits: where experts differ much, four bits for some are worth one bit for others.
    """
    return Method(
        measures=(measure,),
        costs=measured(name),
        quantizer_costs={
            "gptq": measured(f"{name}_gptq"),
            **{gain: gained(name, gain) for gain in ("trellis", "viterbi", ROTATED)},
        },
        gains="others",
        scope="global",
        choices=(1, 2, 3, 4),
        linears=f"{measure}-linears",
    )


def _pmq_costs(scores: Scores, widths: Sequence[int]) -> dict[str, CostTable]:
    return {prefix: _pmq_layer(found, widths) for prefix, found in scores.items()}


def _pmq_layer(scores: LayerScores, widths: Sequence[int]) -> CostTable:
    """Return φ^α · w^β · ε(b); φ and w are normalised within the layer."""
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


def _alpha_costs(scores: Scores, widths: Sequence[int]) -> dict[str, CostTable]:
    """Return each expert's cost, summed over its matrices.

    The exponent depends on a matrix's shape. So each exponent is compared with the median of the same projection.
    """
    experts = [(prefix, expert) for prefix, found in scores.items() for expert in range(len(found["alpha_gate"]))]
    sums = [[0.0] * len(widths) for _ in experts]
    for matrix in (name for name in MATRICES if f"alpha_{name}" in next(iter(scores.values()))):
        exponents, variances, sizes = (
            [scores[prefix][f"{name}_{matrix}"][expert] for prefix, expert in experts]
            for name in ("alpha", "variance", "weights")
        )
        for column, bits in enumerate(widths):
            costs = alpha_costs(exponents, variances, bits, [int(size) for size in sizes])
            for row, cost in zip(sums, costs, strict=True):
                row[column] += cost
    tables: dict[str, list[list[float]]] = {prefix: [] for prefix in scores}
    for (prefix, _), row in zip(experts, sums, strict=True):
        tables[prefix].append(row)
    return dict(tables)


METHODS: dict[str, Method] = {
    # Ours: the budget goes where it lowers the KL divergence to the original most.
    "kl": _divergence("kl", "kl"),
    "kl-estimated": _divergence("kl-estimated", "kl_estimated"),
    # The paper's rule (section 3.3): experts of small router norm first, then those of unusually large variance.
    "router-norm-maxvar": Method(metrics=("router_norm", "max_var"), order=_paper_order, promotes=True),
    # The two halves of the rule by themselves (Table 2).
    "router-norm": Method(metrics=("router_norm",), order=ascending("router_norm")),
    "max-var": Method(metrics=("max_var",), order=descending("max_var")),
    # Often used experts first: by the number of their tokens, or by the summed router probability of these tokens.
    "frequency": Method(observed=("tokens",), order=descending("tokens")),
    "weight": Method(observed=("gate_probability",), order=descending("gate_probability")),
    # MC-MoE (Huang et al., ICLR 2025): measured errors of single experts, weighted by how much they are used.
    "pmq": Method(observed=("tokens", "gate_probability"), measures=("error",), costs=_pmq_costs, kept_widths=2),
    # GEMQ (arXiv 2605.23078): output errors weighted with squared gradients of the loss. It tunes routers afterwards;
    # that is not part of the allocation, and not done here.
    "gemq": Method(measures=("gemq",), costs=measured("gemq"), scope="global"),
    # AlphaQ (arXiv 2606.04980): experts whose spectra have heavy tails, and large weights, cost more to round.
    "alphaq": Method(metrics=("spectrum",), costs=_alpha_costs, scope="global"),
    # HAWQ-v2 (Dong et al., 2020): one width per layer, by the trace of the loss's Hessian times the rounding error.
    "hessian": Method(measures=("hessian",), costs=measured("hessian"), scope="global", layerwise=True),
    # BSP (QuantMoE-Bench, Li et al., 2024): one width per layer, more where a block turns its input further.
    "bsp": Method(measures=("block",), order=ascending("block_score"), scope="global", layerwise=True),
    "bsp-cosine": Method(measures=("block",), order=ascending("block_cosine"), scope="global", layerwise=True),
    # Slim-LLM (Huang et al., ICML 2025): widths per group of weights in every expert (``quantizers/slim.py``).
    "slim": Method(
        only_compared="the format has one width per expert; moeq compare measures it on dequantized weights",
    ),
    "random": Method(order=_shuffled, random=True),
    "uniform": Method(one_width=True),
}

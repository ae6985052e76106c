"""What each width of each expert adds to the model's KL divergence: estimated for all, measured for the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from planner.calibration.kl.interactions import Table, with_interactions
from planner.calibration.kl.measured import Variant, measure_divergence
from planner.calibration.kl.second_order import WEIGHT, Terms, isotropic, projected, second_order
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.common.progress import Progress

MEASURED_TOKENS = 4096
"""Tokens, at most, on which single experts are measured."""

EVIDENCE = 0.1
"""Share of a layer's mean estimate that stands for what is not known of an expert: see :func:`_corrected`."""

PRIOR = 4.0
"""Tokens' worth of what is usual in a layer that every expert's estimate contains."""

UNSEEN = 0.5
"""Tokens of weight that are added to every expert's use: what a text does not show may still come."""


@dataclass(frozen=True)
class Effort:
    """How much of the model may be measured.

    Attributes:
        sequences: on which it is measured.
        tokens: of these sequences.
        passes: tokens × layers that may be computed for it.
    """

    sequences: int = 0
    tokens: int = 0
    passes: float = 0.0

    @classmethod
    def like_pmq(cls, tokens: torch.Tensor, decoder: Decoder, widths: Sequence[int]) -> Effort:
        """Return what PMQ spends on the same tokens: every expert once as it is and once for each width."""
        sequences = max(1, min(len(tokens), MEASURED_TOKENS // tokens.shape[1]))
        return cls(sequences, sequences * tokens.shape[1], tokens.numel() * len(decoder.moe) * (1.0 + len(widths)))


def divergences(
    decoder: Decoder,
    store: HiddenStates,
    tokens: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    widths: Sequence[int],
    effort: Effort,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Table], int]:
    """Return what each width of each expert adds to the KL divergence to the original, and how many were measured.

    Estimated from one backward pass (:mod:`planner.calibration.kl.second_order`) over all tokens; then those with the
    largest estimates are measured on some of the tokens, as many as the effort allows, and the estimates corrected by
    what the measurements say, of the expert alone and among others that are rounded too.

    Args:
        decoder: the model.
        store: the input of every layer and the last one's output.
        tokens: int64 [sequences, length].
        weights: experts prefix → Σ of the router's weights of each expert, as a longer text has it for as many tokens,
            float64 [experts].
        widths: to round to.
        effort: how many are measured.
        seed: of the labels that the gradient draws.
        progress: says how far it is.

    Returns:
        Experts prefix → width → nats per token, float64 [experts].
    """
    terms = {"projected": projected, "isotropic": isotropic}
    sums = second_order(decoder, store, tokens, widths, terms, "sampled", seed, progress, effort.sequences)
    estimates: dict[int, tuple[Table, Table]] = {}
    for index, layer in decoder.moe.items():
        every, some = sums[layer.prefix]
        expected = _expected(_scaled(every, every, widths), every[WEIGHT], weights[layer.prefix])
        estimates[index] = expected, _scaled(some, every, widths)
    wanted = _worth_measuring({index: full for index, (full, _) in estimates.items()}, len(decoder), effort)
    measured = measure_divergence(decoder, store, effort.sequences, wanted, progress)
    subsets = {index: some for index, (_, some) in estimates.items()}
    typical = {bits: _typical(subsets, measured, bits) for bits in widths}
    found = {
        index: _corrected(full, part, measured.get(index, {}), typical) for index, (full, part) in estimates.items()
    }
    if measured:
        found = with_interactions(decoder, store, effort.sequences, found, measured, progress)
    per_token = {
        decoder.moe[index].prefix: {bits: value / tokens.numel() for bits, value in table.items()}
        for index, table in found.items()
    }
    return per_token, sum(len(variants) for variants in wanted.values())


def _scaled(sums: Terms, every: Terms, widths: Sequence[int]) -> Table:
    """Return the isotropic sums, scaled so that the layer's total over all tokens is that of the projected ones.

    A projection is one draw of a variable with as much spread as mean; over an expert with few tokens it says little.
    """
    totals = {name: sum(float(every[f"{name}_{bits}"].sum()) for bits in widths) for name in ("projected", "isotropic")}
    scale = totals["projected"] / totals["isotropic"] if totals["isotropic"] else 0.0
    return {bits: sums[f"isotropic_{bits}"] * scale for bits in widths}


def _expected(seen: Table, weight: torch.Tensor, expected: torch.Tensor) -> Table:
    """Return estimates for experts as often used as in a longer text.

    An expert's damage per unit of the router's weight is drawn to the layer's mean by as much as :data:`PRIOR` units
    would; and none is taken to be used never.
    """
    result: Table = {}
    for bits, values in seen.items():
        usual = float(values.sum() / weight.sum()) if float(weight.sum()) else 0.0
        rate = (values + PRIOR * usual) / (weight + PRIOR)
        result[bits] = rate * (expected + UNSEEN)
    return result


def _worth_measuring(estimates: Mapping[int, Table], layers: int, effort: Effort) -> dict[int, list[Variant]]:
    """Return layer → variants, those with the largest estimates first, until the effort is spent."""
    ranked = sorted(
        (-float(values[expert]), index, expert, bits)
        for index, table in estimates.items()
        for bits, values in table.items()
        for expert in range(len(values))
    )
    chosen: dict[int, list[Variant]] = {}
    left = effort.passes
    for estimate, index, expert, bits in ranked:
        left -= effort.tokens * (layers - index)  # the layers before see no change
        if left < 0 or not estimate or not effort.sequences:
            break
        chosen.setdefault(index, []).append((expert, bits))
    return chosen


def _typical(estimates: Mapping[int, Table], measured: Mapping[int, Mapping[Variant, float]], bits: int) -> float:
    """Return Σ measured / Σ estimated over some layers' experts that were measured at a width."""
    exact = estimated = 0.0
    for index, variants in measured.items():
        for (expert, width), value in variants.items():
            if width == bits:
                exact += value
                estimated += float(estimates[index][bits][expert])
    return exact / estimated if exact > 0 and estimated > 0 else 1.0


def _corrected(full: Table, some: Table, measured: Mapping[Variant, float], typical: Mapping[int, float]) -> Table:
    """Return the estimates over all tokens, times what was measured over what was estimated on the same tokens.

    Both are drawn to the layer's mean for that width: an expert that saw hardly a token there is corrected like the
    others, one that saw many by its own measurement. A layer of which nothing was measured is corrected like the model.
    """
    result: Table = {}
    for bits, values in full.items():
        known = [expert for expert in range(len(values)) if (expert, bits) in measured]
        usual = _typical({0: some}, {0: measured}, bits) if known else typical[bits]
        factors = torch.full_like(values, usual)
        if known:
            exact = torch.tensor([measured[expert, bits] for expert in known], dtype=torch.float64)
            doubt = EVIDENCE * float(some[bits][known].mean())
            factors[known] = (exact + doubt * usual) / (some[bits][known] + doubt)
        result[bits] = values * factors
    return result

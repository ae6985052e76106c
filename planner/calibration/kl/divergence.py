"""The KL divergence that each width of each expert adds: estimated for all, measured for the largest estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from planner.calibration.kl.interactions import Table, with_interactions
from planner.calibration.kl.measured import Variant, measure_divergence
from planner.calibration.kl.second_order import WEIGHT, Terms, isotropic, projected, second_order
from planner.calibration.kl.usage import use_elsewhere
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.common.progress import Progress

MEASURED_TOKENS = 8192
"""Maximum number of tokens on which single experts are measured."""

EVIDENCE = 0.1
"""Weight of a layer's usual correction in :func:`_corrected`, as a share of the layer's mean estimate."""

PRIOR = 4.0
"""Weight of the layer's mean in every expert's estimate, in tokens: see :func:`_expected`."""


@dataclass(frozen=True)
class Effort:
    """A limit on measurements.

    Attributes:
        sequences: number of sequences to measure on.
        tokens: number of tokens in these sequences.
        passes: limit on the computed tokens × layers.
    """

    sequences: int = 0
    tokens: int = 0
    passes: float = 0.0

    @classmethod
    def like_pmq(cls, tokens: torch.Tensor, decoder: Decoder, widths: Sequence[int]) -> Effort:
        """Return the effort of PMQ on the same tokens: one pass of every expert as it is, and one for each width."""
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
    """Return the KL divergence to the original that each width of each expert adds, and the number of measurements.

    One backward pass over all tokens gives the estimates (:mod:`planner.calibration.kl.second_order`). The variants
    with the largest estimates are then measured on some of the tokens, as many variants as the effort allows. The
    measurements correct the estimates, both of the expert alone and of the expert among others that are rounded too.

    Args:
        decoder: the model.
        store: the input of every layer and the last layer's output.
        tokens: int64 [sequences, length].
        weights: experts prefix → Σ of the router's weights of each expert, float64 [experts], of a longer text, scaled
            to this number of tokens.
        widths: bit widths to round to.
        effort: limit on the measurements.
        seed: seed of the labels drawn for the gradient.
        progress: shows the progress.

    Returns:
        Experts prefix → width → nats per token, float64 [experts]; and the number of variants measured.
    """
    terms = {"projected": projected, "isotropic": isotropic}
    sums = second_order(decoder, store, tokens, widths, terms, "sampled", seed, progress, effort.sequences)
    estimates: dict[int, tuple[Table, Table]] = {}
    for index, layer in decoder.moe.items():
        every, some = sums[layer.prefix]
        expected = _expected(_scaled(every, every, widths), every[WEIGHT], use_elsewhere(weights[layer.prefix]))
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
    """Return the isotropic sums, scaled so that the layer's total over all tokens equals that of the projected sums.

    A projection is one draw of a variable whose spread is as large as its mean. For an expert with few tokens it says
    little.
    """
    totals = {name: sum(float(every[f"{name}_{bits}"].sum()) for bits in widths) for name in ("projected", "isotropic")}
    scale = totals["projected"] / totals["isotropic"] if totals["isotropic"] else 0.0
    return {bits: sums[f"isotropic_{bits}"] * scale for bits in widths}


def _expected(seen: Table, weight: torch.Tensor, expected: torch.Tensor) -> Table:
    """Return the estimates for each expert's expected use instead of its use on these tokens.

    An expert's damage per unit of router weight is shrunk towards the layer's mean, as if :data:`PRIOR` more tokens had
    shown the mean.
    """
    result: Table = {}
    for bits, values in seen.items():
        usual = float(values.sum() / weight.sum()) if float(weight.sum()) else 0.0
        rate = (values + PRIOR * usual) / (weight + PRIOR)
        result[bits] = rate * expected
    return result


def _worth_measuring(estimates: Mapping[int, Table], layers: int, effort: Effort) -> dict[int, list[Variant]]:
    """Return layer index → variants to measure: those with the largest estimates, until the effort is spent."""
    ranked = sorted(
        (-float(values[expert]), index, expert, bits)
        for index, table in estimates.items()
        for bits, values in table.items()
        for expert in range(len(values))
    )
    chosen: dict[int, list[Variant]] = {}
    left = effort.passes
    for estimate, index, expert, bits in ranked:
        left -= effort.tokens * (layers - index)  # the layers before it do not change
        if left < 0 or not estimate or not effort.sequences:
            break
        chosen.setdefault(index, []).append((expert, bits))
    return chosen


def _typical(estimates: Mapping[int, Table], measured: Mapping[int, Mapping[Variant, float]], bits: int) -> float:
    """Return Σ measured / Σ estimated over the experts measured at a width; 1 if there is nothing to compare."""
    exact = estimated = 0.0
    for index, variants in measured.items():
        for (expert, width), value in variants.items():
            if width == bits:
                exact += value
                estimated += float(estimates[index][bits][expert])
    return exact / estimated if exact > 0 and estimated > 0 else 1.0


def _corrected(full: Table, some: Table, measured: Mapping[Variant, float], typical: Mapping[int, float]) -> Table:
    """Return the estimates over all tokens, times measured / estimated on the measured tokens.

    Each expert's factor is shrunk towards the layer's factor for that width. So an expert with hardly a token there is
    corrected like the others, and one with many tokens by its own measurement. A layer without measurements at the
    width is corrected like the model.
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

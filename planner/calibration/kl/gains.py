"""A quantizer's output error relative to rounding to nearest, for each width, tried on some experts of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from planner.calibration.gptq.moments import Inputs, Moments
from planner.calibration.gptq.solve import solve_in
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import advance
from planner.calibration.reading.expert import ExpertWeights, load_expert
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.rounded import group_size, rounded
from planner.calibration.reading.routed import Routed, route
from planner.common.progress import Progress
from planner.model.layout import MoeLayer
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError
from planner.quantization.quantizers.rotated import Basis, bases, rotation_of
from planner.quantization.quantizers.table import DEFAULT_WITH_TEXT, QUANTIZERS

TRIED = 2
"""Number of experts to try in each layer."""

BEHIND = 4
"""Width of the rounded experts behind which the tried experts get their inputs. Plans hardly depend on it."""

LEAST, MOST = 256, 8192
"""Minimum and maximum tokens of an expert that is tried. Half of them give second moments, the others errors."""

Gains = dict[str, dict[int, torch.Tensor]]
"""Experts prefix → width → ‖Δ of a quantizer‖² / ‖Δ of rounding to nearest‖², float64 [experts]."""

Errors = Mapping[int, tuple[float, float]]
"""Width → squared output errors of a quantizer and of rounding to nearest."""


@dataclass(frozen=True)
class Trial:
    """One way to quantize an expert.

    Attributes:
        quantizer: a row with calibration of :data:`planner.quantization.quantizers.table.QUANTIZERS`. Widths that it
            lacks are those of GPTQ.
        rotated: whether weights and inputs are rotated before.
    """

    quantizer: str = DEFAULT_WITH_TEXT
    rotated: bool = False


@dataclass(frozen=True)
class Reach:
    """How many experts are tried.

    Attributes:
        every: whether to try every expert with enough tokens; otherwise only :data:`TRIED` of each layer.
        layers: number of layers to try, spread over the model; None tries all.
    """

    every: bool
    layers: int | None = None

    def indices(self, decoder: Decoder) -> set[int]:
        """Return the indices of the layers to try."""
        known = list(decoder.moe)
        if self.layers is None or self.layers >= len(known):
            return set(known)
        return {known[(2 * turn + 1) * len(known) // (2 * self.layers)] for turn in range(self.layers)}


def gains(
    decoder: Decoder,
    store: HiddenStates,
    sequences: int,
    widths: tuple[int, ...],
    trials: Mapping[str, Trial],
    reach: Reach,
    label: str,
    progress: Progress,
) -> dict[str, Gains]:
    """Return name of a trial → its gains: the change Δ of an expert's output beside that of rounding to nearest.

    A quantizer with calibration gains most where rounding to nearest is bad. So costs measured by rounding rank the
    widths wrongly for it. Its expert gets inputs behind rounded layers and aims at the original's outputs, as when a
    model is quantized (asymmetric calibration). So its Δ contains an error of these inputs, which is nearly the same
    for all widths. An expert that is not tried takes the mean of its layer, and a layer without any the mean of the
    others. If no expert has enough tokens to be tried, a line says so and the gains are empty.

    Args:
        decoder: the model.
        store: the input of every layer.
        sequences: number of the store's sequences to read.
        widths: bit widths to compare.
        trials: the ways to quantize, by name.
        reach: how many experts are tried.
        label: name of this work in the progress.
        progress: shows the progress.
    """
    found: dict[str, Gains] = {name: {} for name in trials}
    behind = _behind_rounded(decoder, store, sequences, min(widths, key=lambda bits: abs(bits - BEHIND)))
    wanted = reach.indices(decoder)
    tried = [(index, layer) for index, layer in decoder.moe.items() if index in wanted]
    for index, layer in progress.track(tried, label):
        original = route(decoder, index, store.load(index)[:sequences], store)
        routed = route(decoder, index, behind.load(index), behind).beside(original)
        counts = torch.tensor([int((routed.ids == expert).sum()) for expert in range(layer.num_experts)])
        busiest = counts.argsort(descending=True)[: None if reach.every else TRIED].tolist()
        enough = [expert for expert in busiest if counts[expert] >= LEAST]
        errors = {expert: _errors(decoder, layer, expert, routed, widths, trials) for expert in enough}
        for name in trials:
            own = {expert: error[name] for expert, error in errors.items() if error}
            if own:
                found[name][layer.prefix] = {
                    bits: _ratios(own, bits, layer.num_experts, reach.every) for bits in widths
                }
    if not any(found.values()):
        progress.line(
            f"{label}: not measured, since no expert gets {LEAST} tokens of the text, hence taken as 1; "
            "a longer text is better"
        )
    return {name: _everywhere(decoder, own, widths) if own else {} for name, own in found.items()}


def no_gains(decoder: Decoder, widths: Sequence[int]) -> Gains:
    """Return the gains of rounding to nearest, which are 1."""
    return {
        layer.prefix: {bits: torch.ones(layer.num_experts, dtype=torch.float64) for bits in widths}
        for layer in decoder.moe.values()
    }


def _everywhere(decoder: Decoder, found: Gains, widths: Sequence[int]) -> Gains:
    """Return gains of all layers; those without any take the mean of the others."""
    usual = {bits: torch.stack([own[bits].mean() for own in found.values()]).mean() for bits in widths}
    return {
        layer.prefix: found.get(layer.prefix) or {bits: usual[bits].expand(layer.num_experts) for bits in widths}
        for layer in decoder.moe.values()
    }


def _ratios(errors: Mapping[int, Errors], bits: int, experts: int, every: bool) -> torch.Tensor:
    """Return the gains of a layer's experts at a width from the errors of those that were tried, float64 [experts]."""
    better, plain = (sum(error[bits][part] for error in errors.values()) for part in range(2))
    found = torch.full((experts,), better / plain, dtype=torch.float64)
    if every:
        for expert, error in errors.items():
            found[expert] = error[bits][0] / error[bits][1]
    return found


def _behind_rounded(decoder: Decoder, store: HiddenStates, sequences: int, bits: int) -> HiddenStates:
    """Return the input of every layer in a model whose experts are rounded to a width."""
    states = HiddenStates(store.folder / "rounded", (sequences, *store.shape[1:]), store.dtype)
    states.create(0)[:] = store.load(0)[:sequences]
    states.complete(0)
    widths = {index: [bits] * layer.num_experts for index, layer in decoder.moe.items()}
    for index in range(len(decoder)):
        advance(decoder, index, states.load(index), states.create(index + 1), states, widths)
        states.complete(index + 1)
    return states


def _errors(
    decoder: Decoder,
    layer: MoeLayer,
    expert: int,
    routed: Routed,
    widths: tuple[int, ...],
    trials: Mapping[str, Trial],
) -> dict[str, Errors] | None:
    """Return the errors of each trial; None if calibration fails or rounding changes nothing."""
    tokens, slots = (part[:MOST] for part in routed.slots(expert))
    exact = load_expert(decoder.model, layer, expert, decoder.device, torch.float32)
    own, weights = routed.inputs[tokens].to(decoder.device).float(), routed.weights[tokens, slots].to(decoder.device)
    original = own if routed.originals is None else routed.originals[tokens].to(decoder.device).float()
    seen, test = Inputs(own[::2], original[::2], weights[::2]), slice(1, None, 2)
    wanted = _output(decoder, exact, original[test])
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in trials}
    for bits in widths:
        plain = _squared(_output(decoder, rounded(exact, bits), original[test]) - wanted)
        if not plain:
            return None
        for name, trial in trials.items():
            try:
                better = _output(decoder, _quantized(decoder, layer, exact, seen, bits, trial), own[test])
            except NotPositiveDefiniteError:
                return None
            found[name][bits] = _squared(better - wanted), plain
    return dict(found)


def _squared(values: torch.Tensor) -> float:
    return float(values.square().sum())


def _output(decoder: Decoder, expert: ExpertWeights, inputs: torch.Tensor) -> torch.Tensor:
    return expert(inputs, decoder.activation)


def _quantized(
    decoder: Decoder, layer: MoeLayer, exact: ExpertWeights, seen: Inputs, bits: int, trial: Trial
) -> ExpertWeights:
    """Quantize one expert: gate and up first, then down on the outputs of the quantized gate and up."""
    size = group_size(exact)
    quantizer = trial.quantizer if bits in QUANTIZERS[trial.quantizer].widths else DEFAULT_WITH_TEXT
    turned = bases(layer, rotation_of(layer)) if trial.rotated else {}

    def solve(weight: torch.Tensor, inputs: Inputs, basis: Basis | None) -> torch.Tensor:
        moments = Moments.stack([Moments.of([inputs])])
        return solve_in(basis, weight[None], moments, bits, size, quantizer)[0].dequantize()

    first = exact.split(solve(exact.stacked(), seen, turned.get(layer.projections.gate)))
    inner = exact.replaced((*first, exact.down)).inner(seen.own, decoder.activation)
    wanted = None if seen.original is None else exact.inner(seen.original, decoder.activation)
    down = solve(exact.down, Inputs(inner, wanted, seen.weights), turned.get(layer.projections.down))
    return exact.replaced((*first, down))

"""GPTQ's output error relative to rounding to nearest, for each width, tried on the busiest experts of each layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from planner.calibration.gptq.moments import Inputs, Moments
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import advance
from planner.calibration.reading.expert import ExpertWeights, load_expert
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.rounded import group_size, rounded
from planner.calibration.reading.routed import Routed, route
from planner.common.progress import Progress
from planner.model.layout import MoeLayer
from planner.quantization.quantizers.gptq import GptqSettings, quantize_gptq
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError

TRIED = 2
"""Number of experts to try in each layer."""

BEHIND = 4
"""Width of the rounded experts behind which the tried experts get their inputs. Plans hardly depend on it."""

LEAST, MOST = 256, 8192
"""Minimum and maximum tokens of an expert that is tried. Half of them give second moments, the others errors."""


def gptq_gains(
    decoder: Decoder, store: HiddenStates, sequences: int, widths: tuple[int, ...], every: bool, progress: Progress
) -> dict[str, dict[int, torch.Tensor]]:
    """Return experts prefix → width → ‖Δ of GPTQ‖² / ‖Δ of rounding to nearest‖², float64 [experts].

    Δ is the change of an expert's output.

    GPTQ gains most where rounding to nearest is bad. So costs measured by rounding rank the widths wrongly for GPTQ.
    GPTQ's expert gets inputs behind rounded layers and aims at the original's outputs, as when a model is quantized
    (asymmetric calibration). So its Δ contains an error of these inputs, which is nearly the same for all widths. An
    expert that is not tried takes the mean of its layer, and a layer without any the mean of the others.

    Args:
        decoder: the model.
        store: the input of every layer.
        sequences: number of the store's sequences to read.
        widths: bit widths to compare.
        every: whether to try every expert with enough tokens; otherwise only :data:`TRIED` of each layer.
        progress: shows the progress.
    """
    found: dict[str, dict[int, torch.Tensor]] = {}
    behind = _behind_rounded(decoder, store, sequences, min(widths, key=lambda bits: abs(bits - BEHIND)))
    for index, layer in progress.track(list(decoder.moe.items()), "gains of GPTQ"):
        original = route(decoder, index, store.load(index)[:sequences], store).inputs
        routed = route(decoder, index, behind.load(index), behind).beside(original)
        counts = torch.tensor([int((routed.ids == expert).sum()) for expert in range(layer.num_experts)])
        busiest = counts.argsort(descending=True)[: None if every else TRIED].tolist()
        tried = {
            expert: _errors(decoder, layer, expert, routed, widths) for expert in busiest if counts[expert] >= LEAST
        }
        errors = {expert: error for expert, error in tried.items() if error}
        if errors:
            found[layer.prefix] = {bits: _ratios(errors, bits, layer.num_experts, every) for bits in widths}
    ones = torch.ones((), dtype=torch.float64)
    usual = {
        bits: torch.stack([gains[bits].mean() for gains in found.values()]).mean() if found else ones for bits in widths
    }
    return {
        layer.prefix: found.get(layer.prefix) or {bits: usual[bits].expand(layer.num_experts) for bits in widths}
        for layer in decoder.moe.values()
    }


def _ratios(
    errors: Mapping[int, Mapping[int, tuple[float, float]]], bits: int, experts: int, every: bool
) -> torch.Tensor:
    """Return the gains of a layer's experts at a width from the errors of those that were tried, float64 [experts]."""
    better, plain = (sum(error[bits][part] for error in errors.values()) for part in range(2))
    gains = torch.full((experts,), better / plain, dtype=torch.float64)
    if every:
        for expert, error in errors.items():
            gains[expert] = error[bits][0] / error[bits][1]
    return gains


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
    decoder: Decoder, layer: MoeLayer, expert: int, routed: Routed, widths: tuple[int, ...]
) -> dict[int, tuple[float, float]] | None:
    """Return width → squared output errors of GPTQ and of rounding; None if GPTQ fails or rounding changes nothing."""
    tokens, slots = (part[:MOST] for part in routed.slots(expert))
    exact = load_expert(decoder.model, layer, expert, decoder.device, torch.float32)
    own, weights = routed.inputs[tokens].to(decoder.device).float(), routed.weights[tokens, slots].to(decoder.device)
    original = own if routed.originals is None else routed.originals[tokens].to(decoder.device).float()
    seen, test = Inputs(own[::2], original[::2], weights[::2]), slice(1, None, 2)
    wanted = _output(decoder, exact, original[test])
    found = {}
    for bits in widths:
        try:
            better = _output(decoder, _gptq(decoder, exact, seen, bits), own[test])
        except NotPositiveDefiniteError:
            return None
        plain = _output(decoder, rounded(exact, bits), original[test])
        errors = [float((output - wanted).square().sum()) for output in (better, plain)]
        if not errors[1]:
            return None
        found[bits] = errors[0], errors[1]
    return found


def _output(decoder: Decoder, expert: ExpertWeights, inputs: torch.Tensor) -> torch.Tensor:
    return expert.inner(inputs, decoder.activation) @ expert.down.mT


def _gptq(decoder: Decoder, exact: ExpertWeights, seen: Inputs, bits: int) -> ExpertWeights:
    """Quantize one expert: gate and up first, then down on the outputs of the quantized gate and up."""
    size, settings = group_size(exact), GptqSettings()

    def solve(weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        moments = Moments.stack([Moments.of([inputs])])
        return quantize_gptq(weight[None], moments.second, bits, size, settings, "float", moments.shift)[0].dequantize()

    gate, up = solve(torch.cat((exact.gate, exact.up)), seen).split(len(exact.gate))
    inner = ExpertWeights(gate, up, exact.down).inner(seen.own, decoder.activation)
    wanted = None if seen.original is None else exact.inner(seen.original, decoder.activation)
    return ExpertWeights(gate, up, solve(exact.down, Inputs(inner, wanted, seen.weights)))

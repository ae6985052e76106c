"""GPTQ's output error relative to rounding to nearest, for each width, tried on the busiest experts of each layer."""

from __future__ import annotations

import torch

from planner.calibration.reading.decoder import Decoder
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

LEAST, MOST = 256, 8192
"""Minimum and maximum tokens of an expert that is tried. Half of them give second moments, the others errors."""


def gptq_gains(
    decoder: Decoder, store: HiddenStates, sequences: int, widths: tuple[int, ...], progress: Progress
) -> dict[str, dict[int, float]]:
    """Return experts prefix → width → ‖Δ of GPTQ‖² / ‖Δ of rounding to nearest‖², Δ the change of an expert's output.

    GPTQ gains most where rounding to nearest is bad. So costs measured by rounding rank the widths wrongly for GPTQ. A
    layer whose experts saw too few tokens takes the mean of the others.

    Args:
        decoder: the model.
        store: the input of every layer.
        sequences: number of the store's sequences to read.
        widths: bit widths to compare.
        progress: shows the progress.
    """
    found: dict[str, dict[int, float]] = {}
    for index, layer in progress.track(list(decoder.moe.items()), "gains of GPTQ"):
        routed = route(decoder, index, store.load(index)[:sequences], store)
        counts = torch.tensor([int((routed.ids == expert).sum()) for expert in range(layer.num_experts)])
        busiest = [int(expert) for expert in counts.argsort(descending=True)[:TRIED] if counts[expert] >= LEAST]
        errors = [error for expert in busiest if (error := _errors(decoder, layer, expert, routed, widths))]
        if errors:
            found[layer.prefix] = {
                bits: sum(error[bits][0] for error in errors) / sum(error[bits][1] for error in errors)
                for bits in widths
            }
    usual = {bits: sum(gains[bits] for gains in found.values()) / len(found) if found else 1.0 for bits in widths}
    return {layer.prefix: found.get(layer.prefix, usual) for layer in decoder.moe.values()}


def _errors(
    decoder: Decoder, layer: MoeLayer, expert: int, routed: Routed, widths: tuple[int, ...]
) -> dict[int, tuple[float, float]] | None:
    """Return width → squared output errors of GPTQ and of rounding; None if GPTQ fails or rounding changes nothing."""
    tokens, _ = routed.slots(expert)
    inputs = routed.inputs[tokens[:MOST]].to(decoder.device).float()
    fit, test = inputs[::2], inputs[1::2]
    exact = load_expert(decoder.model, layer, expert, decoder.device, torch.float32)
    wanted = exact.inner(test, decoder.activation) @ exact.down.mT
    found = {}
    for bits in widths:
        try:
            pair = _gptq(decoder, exact, fit, bits), rounded(exact, bits)
        except NotPositiveDefiniteError:
            return None
        better, plain = (
            float((other.inner(test, decoder.activation) @ other.down.mT - wanted).square().sum()) for other in pair
        )
        if not plain:
            return None
        found[bits] = (better, plain)
    return found


def _gptq(decoder: Decoder, exact: ExpertWeights, inputs: torch.Tensor, bits: int) -> ExpertWeights:
    """Quantize one expert: gate and up first, then down on the outputs of the quantized gate and up."""
    size, settings = group_size(exact), GptqSettings()

    def solve(weight: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        moments = seen.mT @ seen / len(seen)
        return quantize_gptq(weight[None], moments[None], bits, size, settings, "float")[0].dequantize()

    gate, up = solve(torch.cat((exact.gate, exact.up)), inputs).split(len(exact.gate))
    inner = ExpertWeights(gate, up, exact.down).inner(inputs, decoder.activation)
    return ExpertWeights(gate, up, solve(exact.down, inner))

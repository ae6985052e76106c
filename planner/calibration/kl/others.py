"""What the quantizers of other schemes gain beside rounding to nearest: see :mod:`planner.calibration.kl.gains`."""

from __future__ import annotations

import torch

from planner.calibration.kl.gains import TRIED, Gains, Reach, Trial, gains, no_gains
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.rounded import rounded
from planner.common.progress import Progress
from planner.model.layout import Layout, MoeLayer
from planner.model.source import SourceModel
from planner.quantization.quantizers import quantizer_for
from planner.quantization.quantizers.rotated import bases, rotation_of
from planner.quantization.quantizers.table import DEFAULT, DEFAULT_ONE_BIT, scheme_for
from vllm_moeq.format import CODES_PER_BLOCK, TRELLIS_SCHEME, UsageError

TRYING = "gains of trellis codes"
"""Name of this work in the progress."""

ROTATED = "rotated"
"""Name of the gains of GPTQ's grids beside trellises: all experts of such a checkpoint are rotated."""

TRIALS = {"trellis": Trial("trellis", rotated=True), ROTATED: Trial(rotated=True)}
"""The trials with calibration, by the name of their gains."""

ALONE = "viterbi"
"""Name of the gains without calibration, and of their quantizer."""

LAYERS = 4
"""Number of layers in which a large model's experts are tried: a trellis of one expert takes minutes."""

SAMPLE = 64
"""Number of rows of each matrix that show the gain without calibration."""


def other_gains(
    decoder: Decoder, store: HiddenStates, sequences: int, widths: tuple[int, ...], small: bool, progress: Progress
) -> dict[str, Gains]:
    """Return ``trellis``, :data:`ROTATED` or :data:`ALONE` → gains.

    If no expert has enough tokens to be tried, those without calibration say what scheme is better.

    Args:
        decoder: the model.
        store: the input of every layer.
        sequences: number of the store's sequences to read.
        widths: bit widths to compare.
        small: whether all experts are tried.
        progress: shows the progress.
    """
    reach = Reach(small, None if small else LAYERS)
    found = gains(decoder, store, sequences, widths, TRIALS, reach, TRYING, progress)
    alone = {layer.prefix: _alone(decoder, layer, widths) for layer in decoder.moe.values()}
    return {
        "trellis": found["trellis"] or alone,
        ROTATED: found[ROTATED] or no_gains(decoder, widths),
        ALONE: alone,
    }


def tried_weights(layout: Layout, small: bool) -> int:
    """Return the number of weights for which a trellis of each width is searched."""
    layers = layout.layers if small else layout.layers[:LAYERS]
    return sum((layer.num_experts if small else TRIED) * layer.weights_per_expert for layer in layers)


def _alone(decoder: Decoder, layer: MoeLayer, widths: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Return the gains of trellises that are found from the weights alone, from a sample of one expert's weights."""
    whole = load_expert(decoder.model, layer, 0, decoder.device, torch.float32)
    sample = whole.replaced(matrix[:SAMPLE] for matrix in whole.matrices())
    turned = bases(layer, rotation_of(layer))
    found = {}
    for bits in widths:
        better, plain = 0.0, 0.0
        quantizer = quantizer_for(bits, DEFAULT, DEFAULT_ONE_BIT, scheme=scheme_for(bits, TRELLIS_SCHEME.name))
        near = rounded(sample, bits).matrices()
        for projection, exact, other in zip(layer.projections.names(), sample.matrices(), near, strict=True):
            basis = turned[projection]
            codes = basis.wrap(quantizer(basis.weights(exact), bits, CODES_PER_BLOCK))
            better += float((codes.dequantize() - exact).square().sum())
            plain += float((other - exact).square().sum())
        ratio = better / plain if plain else 1.0
        found[bits] = torch.full((layer.num_experts,), ratio, dtype=torch.float64)
    return found


def check_trellises(model: SourceModel, layout: Layout, _device: torch.device) -> None:
    """Refuse a model whose experts no trellis fits.

    Raises:
        UsageError: naming the tensor, and what it lacks.
    """
    step, block = TRELLIS_SCHEME.row_step, TRELLIS_SCHEME.column_step
    for layer in layout.layers:
        for projection, (rows, columns) in layer.shapes.items():
            if rows % step or columns % block:
                raise UsageError(
                    f"--scheme: {model.shards.place(layer.weight(0, projection))}: expected multiples of {step} output "
                    f"neurons and {block} inputs for {TRELLIS_SCHEME.name}, found {[rows, columns]}; "
                    f"--scheme grid takes it"
                )

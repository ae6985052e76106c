"""Experts rounded to nearest: fast, and without calibration."""

from __future__ import annotations

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import ExpertWeights, load_expert
from planner.model.layout import MoeLayer
from planner.quantization.quantizers import quantizer_for
from vllm_moeq.format import CODES_PER_BLOCK

QUANTIZER, ONE_BIT = "rtn", "sign"
"""The quantizer, and its variant for one bit. Better quantizers rank the experts in the same order."""


def rounded(weights: ExpertWeights, bits: int) -> ExpertWeights:
    """Return an expert rounded to nearest, in groups of :func:`group_size`."""
    quantizer, size = quantizer_for(bits, QUANTIZER, ONE_BIT), group_size(weights)
    return weights.replaced(quantizer(matrix, bits, size).dequantize().to(matrix) for matrix in weights.matrices())


def group_size(weights: ExpertWeights) -> int:
    """Return the group size: 128 weights per scale, or fewer if 128 does not divide the expert's matrices."""
    columns = [matrix.shape[1] for matrix in weights.matrices()]
    return next(size for size in (128, 64, CODES_PER_BLOCK) if all(count % size == 0 for count in columns))


def load_rounded(decoder: Decoder, layer: MoeLayer, expert: int, bits: int | None) -> ExpertWeights:
    """Return an expert rounded to a width; None leaves it as it is."""
    exact = load_expert(decoder.model, layer, expert, decoder.device, decoder.dtype)
    return exact if bits is None else rounded(exact, bits)

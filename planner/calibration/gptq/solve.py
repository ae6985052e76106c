"""Quantize matrices with the moments of their inputs, by any quantizer with calibration, rotated or as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planner.calibration.gptq.moments import Moments
from planner.quantization.quantizers import QuantizedMatrix, ZeroPoints
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.rotated import Basis
from planner.quantization.quantizers.table import QUANTIZERS

DEFAULTS = GptqSettings()


def solve_in(
    basis: Basis | None,
    weights: torch.Tensor,
    moments: Moments,
    bits: int,
    group_size: int,
    quantizer: str,
    settings: GptqSettings = DEFAULTS,
    zero_points: ZeroPoints = "float",
) -> Sequence[QuantizedMatrix]:
    """Quantize several matrices of one shape with calibration, in a rotated basis or as they are.

    Args:
        basis: the rotation of their inputs, if any.
        weights: float [B, N, K].
        moments: of their inputs in the model's own basis; overwritten.
        bits: width of the codes.
        group_size: weights per scale, or −1 for whole rows.
        quantizer: a row with calibration of :data:`planner.quantization.quantizers.table.QUANTIZERS`.
        settings: the settings of GPTQ.
        zero_points: kind of zero points.

    Raises:
        NotPositiveDefiniteError: the moments cannot be used.
        ValueError: the quantizer has no calibration.
    """
    solve = QUANTIZERS[quantizer].solve
    if solve is None:
        raise ValueError(f"expected a quantizer with calibration, got {quantizer}")
    second, aim = moments.check().second, moments.aim
    if basis is None:
        return solve(weights, second, bits, group_size, settings, zero_points, aim)
    turned = None if aim is None else basis.aim(aim)
    found = solve(basis.weights(weights), basis.moments(second), bits, group_size, settings, zero_points, turned)
    return list(map(basis.wrap, found))

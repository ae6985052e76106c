"""Quantizers of expert matrices, one file each; a new one is a file and a row here."""

from functools import partial

from planner.quantization.quantizers.base import Quantized, Quantizer, ZeroPoints
from planner.quantization.quantizers.hqq import quantize_hqq
from planner.quantization.quantizers.linear import linear_group_size, quantize_linear
from planner.quantization.quantizers.rtn import quantize_rtn
from planner.quantization.quantizers.sign import quantize_sign

QUANTIZERS: dict[str, Quantizer] = {"hqq": quantize_hqq, "rtn": quantize_rtn}
"""For two bits and more."""

ONE_BIT_QUANTIZERS: dict[str, Quantizer] = {
    "sign": quantize_sign,
    "hqq": quantize_hqq,
    "rtn": quantize_rtn,
}
"""For one bit."""

INTEGER_QUANTIZERS: dict[str, Quantizer] = {
    "hqq": partial(quantize_hqq, zero_points="integer"),
    "rtn": partial(quantize_rtn, zero_points="integer"),
}
"""For two bits and more, with zero points that are codes."""


def quantizer_for(bits: int, name: str, one_bit: str, zero_points: ZeroPoints = "float") -> Quantizer:
    """Return the quantizer that a run uses for a width; one bit has float zero points in any case."""
    if bits == 1:
        return ONE_BIT_QUANTIZERS[one_bit]
    return (INTEGER_QUANTIZERS if zero_points == "integer" else QUANTIZERS)[name]


__all__ = [
    "INTEGER_QUANTIZERS",
    "ONE_BIT_QUANTIZERS",
    "QUANTIZERS",
    "Quantized",
    "Quantizer",
    "ZeroPoints",
    "linear_group_size",
    "quantize_hqq",
    "quantize_linear",
    "quantize_rtn",
    "quantize_sign",
    "quantizer_for",
]

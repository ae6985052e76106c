"""Quantizers of expert matrices, one file each; a new one is a file and a row here."""

from planner.quantizers.base import Quantized, Quantizer
from planner.quantizers.hqq import quantize_hqq
from planner.quantizers.linear import linear_group_size, quantize_linear
from planner.quantizers.rtn import quantize_rtn
from planner.quantizers.sign import quantize_sign

QUANTIZERS: dict[str, Quantizer] = {"hqq": quantize_hqq, "rtn": quantize_rtn}
"""For two bits and more."""

ONE_BIT_QUANTIZERS: dict[str, Quantizer] = {
    "sign": quantize_sign,
    "hqq": quantize_hqq,
    "rtn": quantize_rtn,
}
"""For one bit."""


def quantizer_for(bits: int, name: str, one_bit: str) -> Quantizer:
    """Return the quantizer that a run uses for a width."""
    return ONE_BIT_QUANTIZERS[one_bit] if bits == 1 else QUANTIZERS[name]


__all__ = [
    "ONE_BIT_QUANTIZERS",
    "QUANTIZERS",
    "Quantized",
    "Quantizer",
    "linear_group_size",
    "quantize_hqq",
    "quantize_linear",
    "quantize_rtn",
    "quantize_sign",
    "quantizer_for",
]

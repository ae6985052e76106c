"""Quantizers for expert matrices, one file each, and the table that names them."""

from planner.quantization.quantizers.base import Quantized, QuantizedMatrix, Quantizer, ZeroPoints
from planner.quantization.quantizers.hqq import quantize_hqq
from planner.quantization.quantizers.linear import linear_group_size, quantize_linear
from planner.quantization.quantizers.rtn import quantize_rtn
from planner.quantization.quantizers.sign import quantize_sign
from planner.quantization.quantizers.table import QUANTIZERS, QuantizerRow, quantizer_for

__all__ = [
    "QUANTIZERS",
    "Quantized",
    "QuantizedMatrix",
    "Quantizer",
    "QuantizerRow",
    "ZeroPoints",
    "linear_group_size",
    "quantize_hqq",
    "quantize_linear",
    "quantize_rtn",
    "quantize_sign",
    "quantizer_for",
]

"""The kernels for one MoE layer whose experts have different widths."""

from vllm_moeq.kernels.activations import SILU, Activation
from vllm_moeq.kernels.backends import (
    AUTO,
    BACKENDS,
    FALLBACK,
    TABLE,
    VARIABLE,
    Backend,
    LinearKernel,
    MakeLinear,
    choose,
    choose_automatically,
    choose_linear,
    make_layer,
    requested_backend,
)
from vllm_moeq.kernels.interface import LayerKernel, PackedExperts, PackedMatrices
from vllm_moeq.kernels.operator import moe
from vllm_moeq.kernels.ragged import RaggedMatrices, of_one_dtype, ragged, wide_enough
from vllm_moeq.kernels.reference import dense_expert, moe_reference
from vllm_moeq.kernels.reference_layer import ReferenceLayer

__all__ = [
    "AUTO",
    "BACKENDS",
    "FALLBACK",
    "SILU",
    "TABLE",
    "VARIABLE",
    "Activation",
    "Backend",
    "LayerKernel",
    "LinearKernel",
    "MakeLinear",
    "PackedExperts",
    "PackedMatrices",
    "RaggedMatrices",
    "ReferenceLayer",
    "choose",
    "choose_automatically",
    "choose_linear",
    "dense_expert",
    "make_layer",
    "moe",
    "moe_reference",
    "of_one_dtype",
    "ragged",
    "requested_backend",
    "wide_enough",
]

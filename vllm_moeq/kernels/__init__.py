"""The arithmetic: one MoE layer whose experts have different widths."""

from vllm_moeq.kernels.ops import moe
from vllm_moeq.kernels.reference import dense_expert, moe_reference
from vllm_moeq.kernels.storage import RaggedMatrices, ragged

__all__ = ["RaggedMatrices", "dense_expert", "moe", "moe_reference", "ragged"]

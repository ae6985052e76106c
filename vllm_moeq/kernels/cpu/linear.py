"""A packed linear outside the experts, repacked for the native kernel."""

from __future__ import annotations

import torch

from vllm_moeq.format import UsageError
from vllm_moeq.kernels.cpu.build import problem
from vllm_moeq.kernels.cpu.layer import forced_instruction_set, instruction_sets, repack
from vllm_moeq.kernels.interface import PackedMatrices
from vllm_moeq.kernels.ragged import ragged


class NativeLinear:
    """The product x · Wᵀ with a matrix in compressed-tensors' symmetric packing; x is float32, bfloat16 or float16.

    Args:
        words: packed codes with the zero point 2^(b−1), int32 [N, K·b/32] on the CPU; they are not kept.
        scales: scales [N, K/G] of any float dtype.
        bits: the width b, 4 or 8.

    Attributes:
        weight: the repacked matrix, uint8; its scales are float16 if that is exact, else float32.

    Raises:
        UsageError: the kernel cannot be built, or this processor lacks the requested instruction set.
    """

    def __init__(self, words: torch.Tensor, scales: torch.Tensor, bits: int) -> None:
        if problem():
            raise UsageError(problem())
        isa = forced_instruction_set()
        self.rows, self.columns, self.bits = words.shape[0], words.shape[1] * 32 // bits, bits
        self.group_size = self.columns // scales.shape[1]
        half = scales.half()
        self.wide = not torch.equal(half.double(), scales.double())
        exact = (scales.float() if self.wide else half)[None]
        matrices = ragged([bits], self.rows, self.columns, self.group_size)
        zeros = torch.full_like(exact, 2 ** (bits - 1))
        packed = PackedMatrices(matrices, words.contiguous().flatten(), exact, zeros)
        self.weight, _ = repack(packed, gated=False)
        self.isa = instruction_sets().index(isa) if isa else -1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x · Wᵀ [..., N] in x's dtype, for x [..., K]."""
        flat = x.reshape(-1, self.columns)
        result: torch.Tensor = torch.ops.vllm_moeq.native_linear.default(
            flat, self.weight, self.rows, self.bits, self.group_size, self.wide, self.isa
        )
        return result.reshape(*x.shape[:-1], self.rows)

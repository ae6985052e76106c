"""A packed linear that is no expert, in the native kernel's order."""

from __future__ import annotations

import torch

from vllm_moeq.format import UsageError
from vllm_moeq.kernels.cpu.build import problem
from vllm_moeq.kernels.cpu.layer import forced_instruction_set, instruction_sets, repack
from vllm_moeq.kernels.interface import PackedMatrices
from vllm_moeq.kernels.ragged import ragged


class NativeLinear:
    """x · Wᵀ for one matrix in compressed-tensors' symmetric packing; float32, bfloat16 and float16 activations.

    Args:
        words: int32 [N, K·b/32] on the CPU, codes offset by 2^(b−1); not kept.
        scales: any float dtype [N, K / G].
        bits: 4 or 8.

    Attributes:
        weight: uint8, the matrix in the kernel's order, with scales as float16 where that is exact, else as float32.

    Raises:
        UsageError: the kernel cannot be built, or an instruction set is asked for that is not here.
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
        """Return [..., N] in x's dtype for x [..., K]."""
        flat = x.reshape(-1, self.columns)
        result: torch.Tensor = torch.ops.vllm_moeq.native_linear.default(
            flat, self.weight, self.rows, self.bits, self.group_size, self.wide, self.isa
        )
        return result.reshape(*x.shape[:-1], self.rows)

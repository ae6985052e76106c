"""The native backend: a layer repacked for the C++ kernel, and the operator that runs it."""

from __future__ import annotations

import os

import torch

from vllm_moeq.format import UsageError
from vllm_moeq.kernels.cpu.build import problem
from vllm_moeq.kernels.interface import PackedExperts, PackedMatrices

ISA_VARIABLE = "VLLM_MOEQ_CPU_ISA"
"""The variable that forces an instruction set: scalar, avx2, avx512, or vnni (avx512 with dot products of bytes)."""


def instruction_sets() -> list[str]:
    """Return the instruction sets that this processor has, the slowest first; none if the kernel cannot be built."""
    return [] if problem() else str(torch.ops.vllm_moeq.native_isas()).split(",")


def forced_instruction_set() -> str:
    """Return the value of :data:`ISA_VARIABLE`; empty means the fastest.

    Raises:
        UsageError: this processor does not have it.
    """
    isa = os.environ.get(ISA_VARIABLE, "")
    if isa and isa not in instruction_sets():
        raise UsageError(f"{ISA_VARIABLE}: expected one of {', '.join(instruction_sets())}, found {isa}")
    return isa


class NativeLayer:
    """All experts of a layer in one traceable operator, for float32, bfloat16 and float16 activations.

    A token's result depends neither on the number of threads nor on the other tokens of its batch.

    Args:
        packed: the layer as loaded, on the CPU; it is not kept.

    Raises:
        UsageError: the kernel cannot be built, or this processor lacks the instruction set in :data:`ISA_VARIABLE`.
    """

    name = "native"

    def __init__(self, packed: PackedExperts) -> None:
        if problem():
            raise UsageError(problem())
        isa = forced_instruction_set()
        self.hidden, self.intermediate = packed.hidden, packed.intermediate
        wide = packed.gate_up.scales.dtype != packed.down.scales.dtype
        self.gate_up, first = repack(packed.gate_up, gated=True, wide=wide)
        self.down, second = repack(packed.down, gated=False, wide=wide)
        up, down = packed.gate_up.matrices, packed.down.matrices
        wide = wide or packed.down.scales.dtype == torch.float32
        sizes = (self.hidden, self.intermediate, up.group_size, down.group_size, down.group_offset)
        numbers = torch.tensor([*sizes, int(wide), instruction_sets().index(isa) if isa else -1])
        experts = torch.stack([torch.tensor(packed.bits), first, second], dim=1)
        self.numbers = torch.cat([numbers, experts.flatten()])

    @property
    def nbytes(self) -> int:
        """The bytes of the repacked weights: the checkpoint's, plus padding of the rows to blocks of 16 or 32."""
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden] in x's dtype; see :class:`vllm_moeq.kernels.interface.LayerKernel`."""
        result: torch.Tensor = torch.ops.vllm_moeq.native_moe.default(
            x, topk_weights, topk_ids, self.gate_up, self.down, self.numbers
        )
        return result

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Do nothing: there is nothing to compile."""


def repack(packed: PackedMatrices, *, gated: bool, wide: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Repack one projection of all experts for the kernel.

    Args:
        packed: the projection as loaded.
        gated: whether the rows are gate's, then up's.
        wide: whether to keep scales and zeros in float32 even if they are loaded as float16.

    Returns:
        The weights, uint8 [bytes], and each expert's first byte, int64 [E].
    """
    matrices = packed.matrices
    scales, zeros = ((t.float() if wide else t).contiguous() for t in (packed.scales, packed.zeros))
    experts = torch.tensor(list(zip(matrices.bits, matrices.offsets[:-1], strict=True)))
    offsets = torch.empty(len(matrices.bits), dtype=torch.int64)
    numbers = [matrices.rows, matrices.columns, matrices.group_size, matrices.group_offset, int(gated)]
    data = torch.ops.vllm_moeq.native_repack(packed.words, scales, zeros, experts, numbers, offsets)
    return data, offsets

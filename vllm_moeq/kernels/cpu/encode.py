"""The native search for a trellis's codes."""

from __future__ import annotations

import torch

from vllm_moeq.kernels.cpu.build import problem
from vllm_moeq.kernels.cpu.layer import forced_instruction_set, instruction_sets


def native_encode(weights: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Return the bits that each weight adds to its tile's ring, uint8 [tiles, 256]; None without the native library.

    The result depends neither on the instruction set nor on the number of threads.

    Args:
        weights: float32 [tiles, 256] on the CPU, in units of codes.
        codes: the code of each state, integers [4096]; a state's index has its oldest bits on top.
        bits: 1 to 4.

    Raises:
        UsageError: this processor lacks the requested instruction set.
    """
    if problem():
        return None
    isa = forced_instruction_set()
    number = instruction_sets().index(isa) if isa else -1
    result: torch.Tensor = torch.ops.vllm_moeq.native_encode.default(weights, codes.short() * 2, bits, number)
    return result

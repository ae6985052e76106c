"""The native backend: a layer repacked for the C++ kernel, and the operator that runs it."""

from __future__ import annotations

import math
import os

import torch

from vllm_moeq.format import GRID, TRELLIS_SCHEME, UsageError, unpack_signs
from vllm_moeq.kernels.activations import Activation
from vllm_moeq.kernels.cpu.build import problem
from vllm_moeq.kernels.interface import PackedExperts, PackedMatrices
from vllm_moeq.kernels.ragged import RaggedMatrices

SCHEMES = (GRID, TRELLIS_SCHEME)
"""The schemes that the kernel computes from, in the order of ``Scheme`` in ``csrc/core.h``."""

LANES = 16
"""The rows of a block, ``kLanes`` of ``csrc/core.h``."""

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
        wide = any(is_wide(part) for part in (packed.gate_up, packed.down))
        gated = packed.activation.gated
        self.gate_up, first = repack(packed.gate_up, gated=gated, wide=wide)
        self.down, second = repack(packed.down, gated=False, wide=wide)
        up, down = grouping(packed.gate_up.matrices), grouping(packed.down.matrices)
        sizes = (self.hidden, self.intermediate, up[0], *down)
        kernel = instruction_sets().index(isa) if isa else -1
        blocks, factors = rotations(packed)
        does, biases = activation(packed)
        self.floats = torch.cat([does, factors, *(it for it in biases if it is not None)])
        numbers = torch.tensor(
            [*sizes, int(wide), kernel, *blocks, *described(packed.activation), *(it is not None for it in biases)]
        )
        schemes = [SCHEMES.index(scheme) for scheme in packed.gate_up.matrices.schemes]
        experts = torch.stack([torch.tensor(packed.bits), torch.tensor(schemes), first, second], dim=1)
        self.numbers = torch.cat([numbers, experts.flatten()])

    @property
    def nbytes(self) -> int:
        """The bytes of the repacked weights: the checkpoint's, plus padding of the rows to blocks of 16 or 32."""
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden] in x's dtype; see :class:`vllm_moeq.kernels.interface.LayerKernel`."""
        result: torch.Tensor = torch.ops.vllm_moeq.native_moe.default(
            x, topk_weights, topk_ids, self.gate_up, self.down, self.numbers, self.floats
        )
        return result

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Do nothing: there is nothing to compile."""


def is_wide(packed: PackedMatrices) -> bool:
    """Tell whether any scale or zero is float32."""
    return any(tensor.dtype == torch.float32 for tensor in packed.tensors.values())


def grouping(matrices: RaggedMatrices) -> tuple[int, int]:
    """Return the group size and offset by which the kernel cuts columns; without the grid there is one group."""
    if GRID in matrices.schemes:
        return matrices.group_size, matrices.group_offset
    return matrices.columns, 0


def rotations(packed: PackedExperts) -> tuple[list[int], torch.Tensor]:
    """Return the sizes of the rotations before gate and up and before down, 0 for none, and the factors of both."""
    both = (packed.gate_up.rotation, packed.down.rotation)
    factors = [unpack_signs(each.signs).mul(each.size**-0.5) for each in both if each is not None]
    sizes = [0 if each is None else each.size for each in both]
    return sizes, torch.cat([torch.empty(0, dtype=torch.float32), *factors])


def activation(packed: PackedExperts) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the numbers of a layer's activation, and the biases of both projections in the kernel's order of rows."""
    does = packed.activation
    biases = [
        None if part.bias is None else in_panels(part.bias, gated).flatten()
        for part, gated in ((packed.gate_up, does.gated), (packed.down, False))
    ]
    return torch.tensor([does.alpha, does.limit, does.beta], dtype=torch.float32), biases


def described(does: Activation) -> list[int]:
    """Return an activation as the kernel numbers it: its function, whether it has a gate, and whether it has bounds."""
    return [does.number, int(does.gated), int(does.gated and (math.isfinite(does.limit) or does.beta != 0))]


def in_panels(bias: torch.Tensor, gated: bool) -> torch.Tensor:
    """Return biases [E, rows] in the order of panels, 16 of gate beside 16 of up if gated, with zeros at the end."""
    parts = bias.unflatten(1, (2 if gated else 1, -1))
    lanes = LANES if gated else 2 * LANES
    padded = torch.nn.functional.pad(parts, (0, -parts.shape[2] % lanes))
    panels: torch.Tensor = padded.unflatten(2, (-1, lanes)).transpose(1, 2).contiguous()
    return panels


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
    wide = wide or is_wide(packed)
    tensors = {
        suffix: (t.float() if wide and t.is_floating_point() else t).contiguous()
        for suffix, t in packed.tensors.items()
    }
    experts, counts = [], [0] * len(SCHEMES)
    for expert, (scheme, bits) in enumerate(zip(matrices.schemes, matrices.bits, strict=True)):
        words, index = tensors[scheme.codes], SCHEMES.index(scheme)
        first = matrices.view(words, scheme.codes, expert).storage_offset() - words.storage_offset()
        experts.append((bits, index, first, counts[index]))
        counts[index] += 1
    offsets = torch.empty(len(matrices.bits), dtype=torch.int64)
    table = torch.tensor(experts, dtype=torch.int64).reshape(-1, 4)
    buffers = ([tensors[suffix] for suffix in scheme.suffixes if suffix in tensors] for scheme in SCHEMES)
    numbers = [matrices.rows, matrices.columns, *grouping(matrices), int(gated)]
    data = torch.ops.vllm_moeq.native_repack(*buffers, table, numbers, offsets)
    return data, offsets

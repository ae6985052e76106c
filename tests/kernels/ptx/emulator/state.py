"""What the instructions of a running kernel read and change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.ptx.emulator.copies import Copies
from tests.kernels.ptx.emulator.findings import Findings
from tests.kernels.ptx.emulator.global_memory import GlobalMemory
from tests.kernels.ptx.emulator.instructions import Address, Instruction, Operand, Register, Symbol, UnsupportedError
from tests.kernels.ptx.emulator.registers import PER_WARP, Registers
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.shared_memory import SharedMemory


@dataclass
class State:
    """Registers, memories and asynchronous copies of the thread blocks that run side by side."""

    registers: Registers
    memory: GlobalMemory
    shared: SharedMemory
    copies: Copies
    findings: Findings


Action = Callable[[Array], None]
"""An instruction that threads do together or that touches memory; its argument is the threads, in order."""

MakeAction = Callable[[State, Instruction], Action]


def address_of(state: State, operand: Operand, dtype: Any) -> Callable[[Array], Array]:
    """Return a function from threads to the addresses that an operand gives them.

    Raises:
        UnsupportedError: the operand is no address of this size.
    """
    if not isinstance(operand, Address):
        raise UnsupportedError(f"{operand} where an address is expected")
    offset = dtype(operand.offset & (2 ** (8 * np.dtype(dtype).itemsize) - 1))
    if not isinstance(operand.base, Register):
        value = state.registers.symbol(operand.base.name) if isinstance(operand.base, Symbol) else operand.base.value
        return lambda lanes: np.full(len(lanes), value, dtype) + offset
    base = state.registers.raw(operand.base)
    if base.itemsize < np.dtype(dtype).itemsize:
        raise UnsupportedError(f"a 64-bit address in {operand.base.name}")
    return lambda lanes: base[lanes].astype(dtype) + offset


def together(lanes: Array, instruction: Instruction, warps: int = 1) -> Array:
    """Return the threads as [groups, threads of a group], where a group is one or more whole warps.

    Raises:
        UnsupportedError: part of a group is missing.
    """
    size = warps * PER_WARP
    groups = lanes.reshape(-1, size) if len(lanes) % size == 0 else None
    if groups is None or (groups[:, 0] % size).any() or (groups[:, -1] - groups[:, 0] != size - 1).any():
        raise UnsupportedError(f"{instruction}: some threads of a warp do not reach it")
    return groups

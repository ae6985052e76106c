"""How the threads of a warp hold matrices in their registers, and the product of such matrices."""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx.emulator.registers import PER_WARP
from tests.kernels.ptx.emulator.rounding import Array, widen


def _pairs(registers: list[Array]) -> Array:
    """Return registers of pairs as uint16 [warps, 8, 4, registers, 2]."""
    return np.stack(registers, 1).view(np.uint16).reshape(-1, 8, 4, len(registers), 2)


def left(registers: list[Array]) -> Array:
    """Return the left operand [warps, 16, 8·k]; two registers hold eight columns, of rows g and g + 8."""
    halves = len(registers) // 2
    part = _pairs(registers).reshape(-1, 8, 4, halves, 2, 2)  # g, t, k half, row half, pair
    return part.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8 * halves)


def right(registers: list[Array]) -> Array:
    """Return the right operand [warps, 8·k, 8]."""
    part = _pairs(registers)  # g is the column, then t, k half, pair
    return part.transpose(0, 3, 2, 4, 1).reshape(-1, 8 * len(registers), 8)


def accumulator(registers: list[Array]) -> Array:
    """Return the accumulator [warps, 16, 8·n]; four registers hold eight columns."""
    part = np.stack(registers, 1).reshape(-1, 8, 4, len(registers) // 4, 2, 2)  # g, t, n, row half, pair
    return part.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 2 * len(registers))


def scattered(matrix: Array) -> Array:
    """Return an accumulator as registers, [threads, registers]: the inverse of :func:`accumulator`."""
    warps, _, columns = matrix.shape
    part = matrix.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    return part.reshape(warps * PER_WARP, columns // 2)


def product(total: Array, a: Array, b: Array, kind: str) -> Array:
    """Return total + a·b in float32, rounded once. Tensor cores add in an order that nobody documents."""
    found: Array = (total + widen(a, kind).astype(np.float64) @ widen(b, kind).astype(np.float64)).astype(np.float32)
    return found

"""The registers of all threads that run side by side: one array per register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.emulator.instructions import (
    Float,
    Integer,
    Kernel,
    Operand,
    Register,
    Symbol,
    UnsupportedError,
    Vector,
)
from tests.kernels.ptx.emulator.rounding import Array

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

TYPES: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "f16": np.float16, "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64, "pred": np.bool_,
    "f16x2": np.uint32, "bf16x2": np.uint32, "f32x2": np.uint64,
}  # fmt: skip
"""The numpy type of each type; bfloat16 and pairs are bits."""

SIZE = {name: np.dtype(dtype).itemsize for name, dtype in TYPES.items()}
"""Bytes of each type."""

PER_WARP = 32


class Registers:
    """Registers, special registers and constants as arrays.

    Args:
        kernel: the kernel, which declares the registers.
        blocks: thread blocks that run side by side.
        symbols: the address of each array in shared memory.

    Attributes:
        lanes: threads of all blocks.
        block: each thread's block.
        thread: each thread's number in its block.
        parameters: the launch's arguments, as bits.
    """

    def __init__(self, kernel: Kernel, blocks: int, symbols: dict[str, int]) -> None:
        self.kinds = kernel.registers
        self.symbols = symbols
        self.lanes = blocks * kernel.threads
        self.block = np.repeat(np.arange(blocks), kernel.threads)
        self.thread = np.tile(np.arange(kernel.threads, dtype=np.uint32), blocks)
        self.parameters: dict[str, int] = {}
        self._arrays: dict[str, Array] = {}
        self._special = {f"%{name}.{axis}": self._zeros() for name in ("tid", "ctaid", "nctaid") for axis in "xyz"}
        self._special |= {f"%ntid.{axis}": self._zeros() + np.uint32(1) for axis in "xyz"}
        self._special |= {"%laneid": self.thread % PER_WARP, "%warpid": self.thread // PER_WARP}
        self._special["%tid.x"][:] = self.thread
        self._special["%ntid.x"][:] = kernel.threads

    def _zeros(self) -> Array:
        return np.zeros(self.lanes, np.uint32)

    def raw(self, operand: Operand) -> Array:
        """Return a register as it is stored: unsigned bits, or a truth value.

        Raises:
            UnsupportedError: it is no register that the kernel declares.
        """
        if not isinstance(operand, Register) or operand.name not in self.kinds:
            raise UnsupportedError(f"{operand} where a register is expected")
        return self.named(operand.name)

    def named(self, name: str) -> Array:
        """Return a declared register by its name; 8 bits are kept in 16, as in PTX."""
        if name not in self._arrays:
            kind = self.kinds[name]
            dtype = np.bool_ if kind == "pred" else UNSIGNED[max(SIZE[kind], 2)]
            self._arrays[name] = np.zeros(self.lanes, dtype)
        return self._arrays[name]

    def special(self, name: str) -> Array:
        """Return a special register such as %ctaid.x.

        Raises:
            UnsupportedError: the emulator does not have it.
        """
        if name not in self._special:
            raise UnsupportedError(name)
        return self._special[name]

    def target(self, operand: Operand, kind: str) -> Array:
        """Return a register to write, as a type of the same size.

        Raises:
            UnsupportedError: it is no register, or of another size.
        """
        array = self.raw(operand)
        if array.dtype == TYPES[kind]:
            return array
        if array.itemsize != SIZE[kind]:
            raise UnsupportedError(f"{operand} ({array.dtype}) as {kind}")
        return array.view(TYPES[kind])

    def source(self, operand: Operand, kind: str) -> Array:
        """Return a register to read, or an array of one element with a constant: numpy would promote a scalar.

        Raises:
            UnsupportedError: the operand has no value of this type.
        """
        if isinstance(operand, Register):
            return self.special(operand.name) if operand.name in self._special else self.target(operand, kind)
        dtype = np.dtype(TYPES[kind])
        if isinstance(operand, Symbol):
            return np.array([self.symbol(operand.name)], dtype)
        if isinstance(operand, Float):
            return np.frombuffer(operand.bits.to_bytes(operand.size, "little"), dtype).copy()
        if not isinstance(operand, Integer):
            raise UnsupportedError(f"operand {operand}")
        if dtype.kind in "bf":
            return np.array([operand.value], dtype)
        bits = operand.value & (2 ** (8 * dtype.itemsize) - 1)
        return np.frombuffer(bits.to_bytes(dtype.itemsize, "little"), dtype).copy()

    def full(self, operand: Operand, kind: str) -> Array:
        """Return the same with a constant repeated for every thread."""
        value = self.source(operand, kind)
        return value if len(value) == self.lanes else np.full(self.lanes, value[0], value.dtype)

    def predicate(self, guard: tuple[str, bool]) -> Callable[[], Array]:
        """Return a function that tells which threads a guard lets through now."""
        name, negated = guard
        value = self.named(name)
        return (lambda: ~value) if negated else (lambda: value)

    def symbol(self, name: str) -> int:
        """Return the address of an array in shared memory.

        Raises:
            UnsupportedError: there is none of this name.
        """
        if name not in self.symbols:
            raise UnsupportedError(f"symbol {name}")
        return self.symbols[name]


def items(operand: Operand) -> tuple[Operand, ...]:
    """Return the operands in braces, or the one operand without."""
    return operand.items if isinstance(operand, Vector) else (operand,)

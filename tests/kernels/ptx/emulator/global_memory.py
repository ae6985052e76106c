"""Global memory: the memory of real tensors, each at virtual addresses far from all others."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.emulator.findings import Findings, Kind
from tests.kernels.ptx.emulator.registers import UNSIGNED
from tests.kernels.ptx.emulator.rounding import Array

SLOT = 36
"""Every argument has 2^36 addresses of its own, so that no access runs into a neighbour unseen."""

HALF = 1 << (SLOT - 1)
POISON = 0xCDCDCDCDCDCDCDCD


@dataclass(frozen=True)
class Argument:
    """A tensor's memory.

    Attributes:
        name: the parameter's name.
        base: the first virtual address, with the alignment of the real one.
        data: the bytes.
        unwritten: a 1 for each byte that nothing wrote yet; None if something wrote all.
    """

    name: str
    base: int
    data: Array
    unwritten: Array | None

    def gather(self, offset: Array, width: int, count: int) -> Array:
        """Return ``count`` integers of ``width`` bytes at each offset, [n, count]."""
        if self.base % width == 0 and not (offset % width).any():
            whole = self.data[: len(self.data) // width * width].view(UNSIGNED[width])
            found: Array = whole[offset[:, None] // width + np.arange(count)]
            return found
        index = offset[:, None] + np.arange(width * count)
        return np.ascontiguousarray(self.data[index]).view(UNSIGNED[width])

    def scatter(self, offset: Array, values: Array) -> None:
        """Write integers [n, count] at each offset; where threads write to one place, the last one wins."""
        size = values.itemsize * values.shape[1]
        index = offset[:, None] + np.arange(size)
        self.data[index] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
        if self.unwritten is not None:
            self.unwritten[index] = 0


class GlobalMemory:
    """The arguments of one launch.

    Args:
        findings: the place for what is wrong with an access.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.arguments: dict[int, Argument] = {}

    def register(self, name: str, pointer: int, size: int, unwritten: Array | None = None) -> int:
        """Make real memory readable and writable, and return its virtual address."""
        slot = len(self.arguments) + 1
        base = (slot << SLOT) + (pointer & 255)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer)) if size else np.zeros(0, np.uint8)
        self.arguments[slot] = Argument(name, base, data, unwritten)
        return base

    def load(self, address: Array, width: int, count: int, where: str) -> Array:
        """Return ``count`` integers of ``width`` bytes at each address, [n, count]; poison where that is wrong."""
        result = np.full((len(address), count), POISON & (2 ** (8 * width) - 1), UNSIGNED[width])
        for argument, offset, good in self._locate(address, width * count, where, "read"):
            if argument.unwritten is not None and (fresh := argument.unwritten[offset]).any():
                first = int(offset[fresh != 0][0])
                self.findings.add(Kind.UNWRITTEN, where, f"{argument.name}: byte {first}", int(fresh.sum()))
            result[good] = argument.gather(offset, width, count)
        return result

    def store(self, address: Array, values: Array, where: str) -> None:
        """Write integers [n, count] at each address, except where that is wrong."""
        for argument, offset, good in self._locate(address, values.itemsize * values.shape[1], where, "write"):
            argument.scatter(offset, values[good])

    def _locate(self, address: Array, size: int, where: str, what: str) -> list[tuple[Argument, Array, Array]]:
        """Return the arguments that are accessed, with the offsets and the threads of each."""
        result = []
        slots = (address + np.uint64(HALF)) >> np.uint64(SLOT)
        for slot in np.unique(slots):
            threads = np.flatnonzero(slots == slot)
            argument = self.arguments.get(int(slot))
            if argument is None:
                self.findings.add(Kind.WILD, where, f"{what} at {int(address[threads][0]):#x}", len(threads))
                continue
            offset = address[threads].astype(np.int64) - argument.base
            inside = (offset >= 0) & (offset + size <= len(argument.data))
            crooked = (address[threads] & np.uint64(size - 1)) != 0
            for kind, bad in ((Kind.OUT_OF_BOUNDS, ~inside), (Kind.MISALIGNED, crooked)):
                if bad.any():
                    place = (
                        f"{what} of {size} bytes at byte {offset[bad][0]} of {argument.name}, {len(argument.data)} long"
                    )
                    self.findings.add(kind, where, place, int(bad.sum()))
            if inside.any():
                result.append((argument, offset[inside], threads[inside]))
        return result

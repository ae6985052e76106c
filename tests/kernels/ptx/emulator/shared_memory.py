"""Shared memory with a shadow, which says who wrote and read each granule last, and when.

A shadow holds epoch·256 + warp; a thread's epoch counts the barriers that it passed. Two accesses of one epoch by
different warps have no barrier between them.
"""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx.emulator.findings import Findings, Kind
from tests.kernels.ptx.emulator.registers import PER_WARP, UNSIGNED, Registers
from tests.kernels.ptx.emulator.rounding import Array

BASE = 0x400
"""The first address; the system has the first KiB of a real GPU's."""

EPOCH = 256
SEVERAL = 255
"""Stands for several warps."""

GROUP = 254
"""Stands for a warpgroup, whose reads race with writes of any warp."""

NEVER, PENDING = -1, -2
POISON = 0xCD
SPARE = 16
"""Bytes behind the end, for accesses out of bounds."""


class SharedMemory:
    """The shared memory of all thread blocks that run side by side.

    Args:
        registers: tells each thread's block and number.
        size: bytes of each block.
        granule: bytes per shadow, the size of the narrowest access.
        findings: the place for what is wrong.

    Attributes:
        clock: the number of the instruction that runs.
    """

    def __init__(self, registers: Registers, size: int, granule: int, findings: Findings) -> None:
        self.block, self.warp = registers.block, (registers.thread // PER_WARP).astype(np.int32)
        self.limit, self.size = size, -(-size // SPARE) * SPARE
        self.granule, self.findings = granule, findings
        self.blocks = int(self.block[-1]) + 1
        self.data = np.empty(self.blocks * self.size + SPARE, np.uint8)
        shadows = len(self.data) // granule
        self.written, self.read = np.empty(shadows, np.int32), np.empty(shadows, np.int32)
        self.time = np.empty(shadows, np.int64)
        self.fences = np.empty(self.blocks, np.int64)
        self.clock = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything: other thread blocks begin."""
        self.data[:] = POISON
        self.written[:] = NEVER
        self.read[:] = NEVER
        self.time[:] = 0
        self.fences[:] = -1
        self.keys = self.warp.copy()

    def pass_barrier(self, threads: Array) -> None:
        """Begin a new epoch of the threads."""
        self.keys[threads] += EPOCH

    def fence(self, lanes: Array) -> None:
        """Make earlier writes visible to wgmma."""
        self.fences[np.unique(self.block[lanes])] = self.clock

    def place(self, lanes: Array, address: Array, size: int, where: str, what: str) -> Array:
        """Return offsets into the bytes of all blocks; those out of bounds lie in the spare ones."""
        offset = address.astype(np.int64) - BASE
        if (crooked := offset % size != 0).any():
            self.findings.add(Kind.SHARED_MISALIGNED, where, f"{what} at byte {offset[crooked][0]}", int(crooked.sum()))
            offset = offset // size * size
        flat: Array = self.block[lanes] * self.size + offset
        if (outside := (offset < 0) | (offset + size > self.limit)).any():
            detail = f"{what} at byte {offset[outside][0]} of {self.limit}"
            self.findings.add(Kind.SHARED_OUT_OF_BOUNDS, where, detail, int(outside.sum()))
            flat[outside] = self.blocks * self.size
        return flat

    def load(self, lanes: Array, address: Array, width: int, count: int, where: str) -> Array:
        """Return ``count`` integers of ``width`` bytes at each address, [n, count]."""
        flat = self.place(lanes, address, width * count, where, "read")
        self.check_read(flat, width * count, self.keys[lanes], where)
        return self._gather(flat, width, count)

    def store(self, lanes: Array, address: Array, values: Array, where: str) -> None:
        """Write integers [n, count] at each address."""
        width, count = values.itemsize, values.shape[1]
        flat = self.place(lanes, address, width * count, where, "write")
        self._check_write(flat, width * count, self.keys[lanes], where, same=self._gather(flat, width, count) == values)
        self.data.view(UNSIGNED[width])[flat[:, None] // width + np.arange(count)] = values
        self._mark_written(flat, width * count, self.keys[lanes])
        if (self._gather(flat, width, count) != values).any():
            self.findings.add(Kind.ONE_ADDRESS, where, f"byte {flat[0] % self.size}")

    def begin_copy(self, lanes: Array, address: Array, size: int, where: str) -> Array:
        """Announce an asynchronous copy to each address, and return where it goes."""
        flat = self.place(lanes, address, size, where, "cp.async")
        self._check_write(flat, size, self.keys[lanes], where)
        self.written[self._shadows(flat, size)] = PENDING
        return flat

    def end_copy(self, lanes: Array, flat: Array, data: Array) -> None:
        """Write what asynchronous copies brought, uint8 [n, size]."""
        size = data.shape[1]
        self.data[flat[:, None] + np.arange(size)] = data
        self._mark_written(flat, size, self.keys[lanes])

    def operand(self, lanes: Array, address: Array, where: str, what: str) -> Array:
        """Return 16-bit values [n, count] that a warpgroup reads by wgmma; each row belongs to one of the threads."""
        threads = np.repeat(lanes, address.shape[1])
        flat = self.place(threads, address.ravel(), 2, where, what)
        self.check_read(flat, 2, self.keys[threads] // EPOCH * EPOCH + GROUP, where)
        late = self.time[flat // self.granule] > self.fences[self.block[threads]]
        if late.any():
            self.findings.add(Kind.NOT_FENCED, where, what, int(late.sum()))
        return self._gather(flat, 2, 1).reshape(address.shape)

    def check_read(self, flat: Array, size: int, key: Array, where: str) -> None:
        """Note what is wrong with a read, and who read."""
        index, key = self._shadows(flat, size), key[:, None]
        written = self.written[index]
        if written.min() < 0:
            self._report(Kind.NEVER_WRITTEN, written == NEVER, flat, where)
            self._report(Kind.NOT_WAITED_FOR, written == PENDING, flat, where)
        self._report(Kind.READ_AFTER_WRITE, (written >= 0) & _races(written, key), flat, where)
        before = self.read[index]
        several = (before >= 0) & _races(before, key)
        self.read[index] = np.where(several, key | SEVERAL, key)
        after = self.read[index]
        clash = (after != key) & (after % EPOCH != SEVERAL)
        self.read[index[clash]] |= SEVERAL

    def _check_write(self, flat: Array, size: int, key: Array, where: str, same: Array | None = None) -> None:
        """Note what is wrong with a write; writing what is there already (``same``) does no harm."""
        index, key = self._shadows(flat, size), key[:, None]
        written, read = self.written[index], self.read[index]
        self._report(Kind.WRITE_AFTER_READ, (read >= 0) & _races(read, key), flat, where)
        self._report(Kind.COPY_IN_FLIGHT, written == PENDING, flat, where)
        races = (written >= 0) & _races(written, key)
        if same is not None:
            races &= ~same.all(1, keepdims=True)
        self._report(Kind.WRITE_AFTER_WRITE, races, flat, where)

    def _report(self, kind: Kind, bad: Array, flat: Array, where: str) -> None:
        threads = np.asarray(bad.any(1))
        if threads.any():
            self.findings.add(kind, where, f"byte {flat[threads][0] % self.size}", int(threads.sum()))

    def _shadows(self, flat: Array, size: int) -> Array:
        index: Array = flat[:, None] // self.granule + np.arange(max(size // self.granule, 1))
        return index

    def _mark_written(self, flat: Array, size: int, key: Array) -> None:
        index = self._shadows(flat, size)
        self.written[index] = key[:, None]
        self.time[index] = self.clock

    def _gather(self, flat: Array, width: int, count: int) -> Array:
        found: Array = self.data.view(UNSIGNED[width])[flat[:, None] // width + np.arange(count)]
        return found


def _races(shadow: Array, key: Array) -> Array:
    """Tell where a shadow and a key are of one epoch and different warps."""
    return (shadow != key) & (shadow // EPOCH == key // EPOCH)

"""Asynchronous copies: what they bring is written when the thread that asked waits, not before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.shared_memory import SharedMemory

UNCOMMITTED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Copy:
    """One instruction's copies.

    Attributes:
        lanes: the threads that asked.
        flat: where each goes in shared memory.
        data: the bytes, [n, size].
        group: the group of each thread that the copy belongs to.
    """

    lanes: Array
    flat: Array
    data: Array
    group: Array

    def part(self, chosen: Array) -> Copy:
        """Return the copies of some threads."""
        return Copy(self.lanes[chosen], self.flat[chosen], self.data[chosen], self.group[chosen])


class Copies:
    """The copies in flight, in the order in which they were asked for.

    Args:
        lanes: the number of threads.
        shared: the memory that they go to.
    """

    def __init__(self, lanes: int, shared: SharedMemory) -> None:
        self.shared = shared
        self.flying: list[Copy] = []
        self.groups = np.zeros(lanes, np.int64)

    def reset(self) -> None:
        """Forget everything: other thread blocks begin."""
        self.flying.clear()
        self.groups[:] = 0

    def start(self, lanes: Array, flat: Array, data: Array) -> None:
        """Add a copy that is not committed yet."""
        self.flying.append(Copy(lanes, flat, data, np.full(len(lanes), UNCOMMITTED)))

    def commit(self, lanes: Array) -> None:
        """Put the threads' uncommitted copies into a group."""
        chosen = self._marked(lanes)
        for copy in self.flying:
            mine = (copy.group == UNCOMMITTED) & chosen[copy.lanes]
            copy.group[mine] = self.groups[copy.lanes[mine]]
        self.groups[lanes] += 1

    def wait(self, lanes: Array, keep: int) -> None:
        """Finish the threads' groups except for the latest ``keep``."""
        ready = np.full(len(self.groups), -1)
        ready[lanes] = self.groups[lanes] - keep
        left = []
        for copy in self.flying:
            done = copy.group < ready[copy.lanes]
            if done.any():
                finished = copy.part(done)
                self.shared.end_copy(finished.lanes, finished.flat, finished.data)
            if not done.all():
                left.append(copy.part(~done))
        self.flying = left

    def _marked(self, lanes: Array) -> Array:
        chosen = np.zeros(len(self.groups), bool)
        chosen[lanes] = True
        return chosen

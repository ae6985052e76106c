"""Where the threads are: jumps, barriers and ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.emulator.findings import Kind
from tests.kernels.ptx.emulator.instructions import Instruction, Integer, Kernel, Operand, Symbol, UnsupportedError
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.state import State

STEPS = 200_000
"""Blocks of instructions that a thread block may run before it counts as endless."""


@dataclass(frozen=True)
class Waiting:
    """Threads at a barrier.

    Attributes:
        threads: a mask of them.
        after: the block of instructions behind the barrier.
        line: the barrier's line.
    """

    threads: Array
    after: int
    line: int


class Flow:
    """The control flow of some thread blocks.

    Args:
        kernel: the kernel.
        state: what it runs on.
        alive: a mask of the threads that begin.
    """

    def __init__(self, kernel: Kernel, state: State, alive: Array) -> None:
        self.kernel, self.state = kernel, state
        self.alive = alive.copy()
        self.pending = {0: alive}
        self.waiting: list[Waiting] = []
        self.steps = 0

    def next(self) -> tuple[int, Array] | None:
        """Return the next block of instructions with the threads that run it; None at the end.

        Raises:
            UnsupportedError: the kernel does not end.
        """
        self.steps += 1
        if self.steps > STEPS:
            raise UnsupportedError("a kernel that does not end")
        if not self.pending:
            return None
        index = min(self.pending)
        return index, self.pending.pop(index)

    def leave(self, index: int, mask: Array) -> None:
        """Send the threads on that ran a block of instructions."""
        instructions = self.kernel.blocks[index].instructions
        end = instructions[-1] if instructions else None
        if end is None or not end.ends_block:
            self._go(index + 1, mask)
            return
        guard = end.guard
        taken = mask if guard is None else mask & self.state.registers.predicate(guard)()
        self._take(end, index + 1, taken)
        self._go(index + 1, mask & ~taken)

    def _take(self, end: Instruction, following: int, taken: Array) -> None:
        if end.name == "bra":
            self._go(self._label(end.args[0]), taken)
        elif end.name == "brx":
            self._jump_by_table(end, taken)
        elif end.name in ("ret", "exit"):
            self.alive &= ~taken
            self._release()
        elif end.is_barrier and end.guard is None and all(isinstance(arg, Integer) for arg in end.args):
            if len(end.args) > 1 and end.args[1] != Integer(self.kernel.threads):
                raise UnsupportedError(f"{end}: part of a thread block")
            self.waiting.append(Waiting(taken, following, end.line))
            self._release()
        else:
            raise UnsupportedError(str(end))

    def _label(self, operand: Operand) -> int:
        if not isinstance(operand, Symbol):
            raise UnsupportedError(f"a jump to {operand}")
        return self.kernel.labels[operand.name]

    def _jump_by_table(self, end: Instruction, taken: Array) -> None:
        choice, (_, table) = self.state.registers.raw(end.args[0]), end.args
        labels = self.kernel.tables[table.name] if isinstance(table, Symbol) else []
        for value in np.unique(choice[taken]):
            if value >= len(labels):
                raise UnsupportedError(f"{end}: {value} of {len(labels)}")
            self._go(self.kernel.labels[labels[int(value)]], taken & (choice == value))

    def _go(self, index: int, threads: Array) -> None:
        if threads.any():
            self.pending[index] = self.pending[index] | threads if index in self.pending else threads.copy()

    def _release(self) -> None:
        """Let the thread blocks pass whose threads have all arrived at a barrier."""
        if not self.waiting:
            return
        arrived = np.logical_or.reduce([place.threads for place in self.waiting])
        missing = (self.alive & ~arrived).reshape(-1, self.kernel.threads).any(1)
        free = np.repeat(~missing, self.kernel.threads) & arrived
        if not free.any():
            return
        self.state.shared.pass_barrier(free)
        passed = {place.line for place in self.waiting if (place.threads & free).any()}
        if len(passed) > 1:
            self.state.findings.add(Kind.BARRIERS, f"lines {sorted(passed)}", "")
        for place in self.waiting:
            self._go(place.after, place.threads & free)
        left = [Waiting(place.threads & ~free, place.after, place.line) for place in self.waiting]
        self.waiting = [place for place in left if place.threads.any()]

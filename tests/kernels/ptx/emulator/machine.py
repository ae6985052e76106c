"""Runs PTX: all threads of one or several thread blocks at once, each instruction by numpy.

Threads that part ways wait at their block of instructions; the first such block runs next, so that threads meet again
where their paths join.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.emulator import warpgroups
from tests.kernels.ptx.emulator.actions import action
from tests.kernels.ptx.emulator.arithmetic import Step, arithmetic
from tests.kernels.ptx.emulator.bits import MAKERS
from tests.kernels.ptx.emulator.conversions import convert
from tests.kernels.ptx.emulator.copies import Copies
from tests.kernels.ptx.emulator.findings import Findings
from tests.kernels.ptx.emulator.flow import Flow
from tests.kernels.ptx.emulator.global_memory import GlobalMemory
from tests.kernels.ptx.emulator.instructions import Instruction, Kernel, UnsupportedError
from tests.kernels.ptx.emulator.registers import SIZE, Registers
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.shared_memory import BASE, SharedMemory
from tests.kernels.ptx.emulator.state import Action, State

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Compiled:
    """An instruction, ready to run.

    Attributes:
        whole: a function that runs it for all threads.
        some: a function that runs it for the threads of a mask.
    """

    whole: Callable[[], None]
    some: Callable[[Array], None]


class Machine:
    """A kernel, ready to run.

    Args:
        kernel: the kernel.
        dynamic: bytes of dynamic shared memory.
        blocks: thread blocks that run side by side.
    """

    def __init__(self, kernel: Kernel, dynamic: int, blocks: int) -> None:
        self.kernel, self.blocks = kernel, blocks
        self.findings = Findings()
        symbols, size = _layout(kernel, dynamic)
        registers = Registers(kernel, blocks, symbols)
        shared = SharedMemory(registers, size, _granule(kernel), self.findings)
        memory = GlobalMemory(self.findings)
        self.state = State(registers, memory, shared, Copies(registers.lanes, shared), self.findings)
        self._all = np.arange(registers.lanes)
        self._compiled: dict[int, list[Compiled]] = {}

    def start(self) -> None:
        """Forget the last launch: its arguments and what was found."""
        self.findings.clear()
        self.state.memory.arguments.clear()
        for index in self._compiled:
            warpgroups.check_block(self.kernel.blocks[index], self.findings)

    def run(self, grid: Grid, parameters: Sequence[int]) -> None:
        """Run a grid, x fastest.

        Args:
            grid: the number of thread blocks in each dimension.
            parameters: the arguments as bits; parameters behind them are 0.

        Raises:
            UnsupportedError: the kernel does what the emulator does not know.
        """
        names, registers = self.kernel.parameters, self.state.registers
        registers.parameters = dict.fromkeys(names, 0) | dict(zip(names, parameters, strict=False))
        for axis, size in zip("xyz", grid, strict=True):
            registers.special(f"%nctaid.{axis}")[:] = size
        total = grid[0] * grid[1] * grid[2]
        with np.errstate(all="ignore"):
            for start in range(0, total, self.blocks):
                self._run_blocks(grid, np.arange(start, min(start + self.blocks, total)))

    def _run_blocks(self, grid: Grid, numbers: Array) -> None:
        """Run some thread blocks to their end."""
        padded = np.pad(numbers, (0, self.blocks - len(numbers)))
        places = (padded % grid[0], padded // grid[0] % grid[1], padded // (grid[0] * grid[1]))
        for axis, place in zip("xyz", places, strict=True):
            self.state.registers.special(f"%ctaid.{axis}")[:] = np.repeat(place, self.kernel.threads)
        self.state.shared.reset()
        self.state.copies.reset()
        flow = Flow(self.kernel, self.state, self._all < len(numbers) * self.kernel.threads)
        while (there := flow.next()) is not None:
            index, mask = there
            everybody = bool(mask.all())
            for compiled in self._block(index):
                self.state.shared.clock += 1
                if everybody:
                    compiled.whole()
                else:
                    compiled.some(mask)
            flow.leave(index, mask)

    def _block(self, index: int) -> list[Compiled]:
        if index not in self._compiled:
            block = self.kernel.blocks[index]
            warpgroups.check_block(block, self.findings)
            code = [instruction for instruction in block.instructions if not instruction.ends_block]
            self._compiled[index] = [self._compile(instruction) for instruction in code]
        return self._compiled[index]

    def _compile(self, instruction: Instruction) -> Compiled:
        run = action(self.state, instruction)
        if run is not None:
            return self._threads(instruction, run)
        step = self._step(instruction)
        if step is None:
            raise UnsupportedError(str(instruction))
        return self._everywhere(instruction, step)

    def _step(self, instruction: Instruction) -> Step | None:
        if instruction.name == "cvt":
            return convert(self.state.registers, instruction)
        if make := MAKERS.get(instruction.name):
            return make(self.state.registers, instruction)
        return arithmetic(self.state.registers, instruction)

    def _threads(self, instruction: Instruction, run: Action) -> Compiled:
        """Compile an action, which is told its threads."""

        def some(mask: Array) -> None:
            lanes = np.flatnonzero(mask)
            if len(lanes):
                run(lanes)

        if instruction.guard is None:
            return Compiled(lambda: run(self._all), some)
        chosen = self.state.registers.predicate(instruction.guard)
        return Compiled(lambda: some(chosen()), lambda mask: some(mask & chosen()))

    def _everywhere(self, instruction: Instruction, step: Step) -> Compiled:
        """Compile a step, which computes all threads: those that were not to run get their values back."""

        def some(mask: Array) -> None:
            before = [target.copy() for target in step.targets]
            step.run()
            for target, old in zip(step.targets, before, strict=True):
                np.copyto(target, old, where=~mask)

        if instruction.guard is None:
            return Compiled(step.run, some)
        chosen = self.state.registers.predicate(instruction.guard)
        return Compiled(lambda: some(chosen()), lambda mask: some(mask & chosen()))


def _layout(kernel: Kernel, dynamic: int) -> tuple[dict[str, int], int]:
    """Return the address of each array in shared memory, and the bytes of all."""
    symbols, end = {}, 0
    for name, (size, align) in sorted(kernel.shared.items(), key=lambda item: not item[1][0]):
        end = -(-end // (align if size else 1024)) * (align if size else 1024)
        symbols[name] = BASE + end
        end += size or dynamic
    return symbols, end


def _granule(kernel: Kernel) -> int:
    """Return the bytes of the narrowest access to shared memory, at most four."""
    accesses = (it for block in kernel.blocks for it in block.instructions if re.match(r"(ld|st)\..*shared", it.op))
    return min([4, *(SIZE[instruction.mods[-1]] for instruction in accesses)])

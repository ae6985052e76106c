"""Instructions through which the threads of a warp see each other's registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.emulator.instructions import Instruction, Operand, Symbol, UnsupportedError
from tests.kernels.ptx.emulator.registers import PER_WARP, TYPES, items
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.state import Action, State, together

FULL = 0xFFFFFFFF
REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip

SHUFFLES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "up": lambda own, by, _: own - by,
    "down": lambda own, by, _: own + by,
    "bfly": lambda own, by, _: own ^ by,
    "idx": lambda own, by, segment: (own & segment) | (by & ~segment),
}
"""The number of the thread that each reads, from its own one, the operand and the mask of a segment."""


def _whole(state: State, instruction: Instruction, members: Operand) -> Callable[[Array], Array]:
    """Return a check that whole warps take part."""
    mask = state.registers.full(members, "b32")

    def check(lanes: Array) -> Array:
        if (mask[lanes] != FULL).any():
            raise UnsupportedError(f"{instruction}: part of a warp")
        return together(lanes, instruction)

    return check


def shuffle(state: State, instruction: Instruction) -> Action:
    """Make shfl: a value of another thread."""
    first, *flags = items(instruction.args[0])
    target = state.registers.raw(first)
    flag = state.registers.raw(flags[0]) if flags else None
    source, by, bounds = (state.registers.full(arg, "b32") for arg in instruction.args[1:4])
    check, mode = _whole(state, instruction, instruction.args[4]), instruction.mods[1]
    number = (state.registers.thread % PER_WARP).astype(np.int64)

    def run(lanes: Array) -> None:
        check(lanes)
        own, steps = number[lanes], (by[lanes] & 31).astype(np.int64)
        clamp, segment = ((bounds[lanes] >> shift & 31).astype(np.int64) for shift in (0, 8))
        edge = (own & segment) | (clamp & ~segment)
        other = SHUFFLES[mode](own, steps, segment)
        good = other >= edge if mode == "up" else other <= edge
        values = source[lanes - own + np.where(good, other, own)]
        target[lanes] = values
        if flag is not None:
            flag[lanes] = good

    return run


def reduce(state: State, instruction: Instruction) -> Action:
    """Make redux: one result for the whole warp."""
    name, kind = instruction.mods[1:3]
    target = state.registers.target(instruction.args[0], kind)
    source = state.registers.full(instruction.args[1], kind)
    check, function = _whole(state, instruction, instruction.args[2]), REDUCTIONS[name]

    def run(lanes: Array) -> None:
        rows = source[check(lanes)]
        target[lanes] = np.repeat(function.reduce(rows, axis=1, dtype=TYPES[kind]), PER_WARP)

    return run


def ballot(state: State, instruction: Instruction) -> Action:
    """Make vote.sync.ballot: a bit of each thread."""
    if instruction.mods[1] != "ballot" or instruction.guard is not None:
        raise UnsupportedError(str(instruction))
    target, source = state.registers.raw(instruction.args[0]), state.registers.full(instruction.args[1], "pred")
    check = _whole(state, instruction, instruction.args[2])

    def run(lanes: Array) -> None:
        words = np.packbits(source[check(lanes)], axis=1, bitorder="little").view(np.uint32)[:, 0]
        target[lanes] = np.repeat(words, PER_WARP)

    return run


def elect(state: State, instruction: Instruction) -> Action:
    """Make elect: the first thread of each warp."""
    leader, elected = items(instruction.args[0])
    if not isinstance(leader, Symbol):
        raise UnsupportedError(str(instruction))
    flag = state.registers.raw(elected)
    number = state.registers.thread % PER_WARP

    def run(lanes: Array) -> None:
        together(lanes, instruction)
        flag[lanes] = number[lanes] == 0

    return run

"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.emulator.instructions import (
    Address,
    Instruction,
    Integer,
    Operand,
    Register,
    Symbol,
    UnsupportedError,
)
from tests.kernels.ptx.emulator.registers import SIZE, TYPES, UNSIGNED, items
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.state import Action, State, address_of

SPACES = ("param", "global", "shared")
COPY = re.compile(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\w+)?")
ATOMICS: dict[str, Callable[[Array, Array], Array]] = {"add": np.add, "min": np.minimum, "max": np.maximum}


def _space(instruction: Instruction) -> str:
    for mod in instruction.mods:
        if (name := mod.split("::")[0]) in SPACES:
            return name
    raise UnsupportedError(str(instruction))


def _widths(instruction: Instruction, operand: Operand) -> tuple[str, int]:
    """Return the type and the number of values, which must be as many as the operand has."""
    kind, count = instruction.mods[-1], len(items(operand))
    if count != next((int(mod[1]) for mod in instruction.mods if mod in ("v2", "v4", "v8")), 1):
        raise UnsupportedError(str(instruction))
    return kind, count


def load(state: State, instruction: Instruction) -> Action:
    """Make ld from any space."""
    kind, count = _widths(instruction, instruction.args[0])
    targets = [None if isinstance(item, Symbol) else state.registers.raw(item) for item in items(instruction.args[0])]
    fetch = _fetch(state, instruction, SIZE[kind], count)
    signed = TYPES[f"s{8 * SIZE[kind]}"] if kind[0] == "s" else None

    def run(lanes: Array) -> None:
        values = fetch(lanes)
        for index, target in enumerate(targets):
            if target is not None:
                value = values[:, index] if signed is None else values[:, index].view(signed).astype(np.int64)
                target[lanes] = value.astype(target.dtype)

    return run


def _fetch(state: State, instruction: Instruction, width: int, count: int) -> Callable[[Array], Array]:
    """Return a function from threads to what they load, [n, count]."""
    space, place, where = _space(instruction), instruction.args[1], str(instruction)
    if space == "param":
        if not isinstance(place, Address) or not isinstance(place.base, Symbol) or place.offset or count > 1:
            raise UnsupportedError(where)
        name, mask, registers = place.base.name, 2 ** (8 * width) - 1, state.registers
        return lambda lanes: np.full((len(lanes), 1), registers.parameters[name] & mask, UNSIGNED[width])
    if space == "shared":
        near = address_of(state, place, np.uint32)
        return lambda lanes: state.shared.load(lanes, near(lanes), width, count, where)
    far = address_of(state, place, np.uint64)
    return lambda lanes: state.memory.load(far(lanes), width, count, where)


def store(state: State, instruction: Instruction) -> Action:
    """Make st to global or shared memory."""
    place, operand = instruction.args
    kind, _ = _widths(instruction, operand)
    width, where = SIZE[kind], str(instruction)
    sources = [
        state.registers.raw(item) if isinstance(item, Register) else state.registers.full(item, f"b{8 * width}")
        for item in items(operand)
    ]
    if any(source.itemsize < width for source in sources):
        raise UnsupportedError(where)

    def values(lanes: Array) -> Array:
        return np.stack([source[lanes].astype(UNSIGNED[width]) for source in sources], 1)

    if _space(instruction) == "shared":
        near = address_of(state, place, np.uint32)
        return lambda lanes: state.shared.store(lanes, near(lanes), values(lanes), where)
    far = address_of(state, place, np.uint64)
    return lambda lanes: state.memory.store(far(lanes), values(lanes), where)


def atomic(state: State, instruction: Instruction) -> Action:
    """Make atom and red on global memory, one thread after the other."""
    kind, where = instruction.mods[-1], str(instruction)
    function = next((ATOMICS[mod] for mod in instruction.mods if mod in ATOMICS), None)
    if function is None or _space(instruction) != "global":
        raise UnsupportedError(where)
    returns = instruction.name == "atom" and not isinstance(instruction.args[0], Symbol)
    target = state.registers.raw(instruction.args[0]) if returns else None
    place, value = instruction.args[-2:]
    address, source = address_of(state, place, np.uint64), state.registers.full(value, kind)

    def run(lanes: Array) -> None:
        for index in range(len(lanes)):
            lane = lanes[index : index + 1]
            old = state.memory.load(address(lane), SIZE[kind], 1, where)
            new = function(old[:, 0].view(TYPES[kind]), source[lane])
            state.memory.store(address(lane), new.view(UNSIGNED[SIZE[kind]])[:, None], where)
            if target is not None:
                target[lane] = old[:, 0]

    return run


def start_copy(state: State, instruction: Instruction) -> Action:
    """Make cp.async, also one that fills with zeros where nothing is to be read."""
    size, where = instruction.args[2], str(instruction)
    if not COPY.fullmatch(instruction.op) or not isinstance(size, Integer) or size.value not in (4, 8, 16):
        raise UnsupportedError(where)
    to, source = (
        address_of(state, place, dtype) for place, dtype in zip(instruction.args, (np.uint32, np.uint64), strict=False)
    )
    bytes_ = size.value
    read = state.registers.full(instruction.args[3], "u32") if len(instruction.args) > 3 else None

    def run(lanes: Array) -> None:
        flat = state.shared.begin_copy(lanes, to(lanes), bytes_, where)
        data = np.zeros((len(lanes), bytes_), np.uint8)
        wanted = np.full(len(lanes), True) if read is None else read[lanes] != 0
        if read is not None and (read[lanes][wanted] != bytes_).any():
            raise UnsupportedError(f"{where}: part of a copy")
        if wanted.any():
            width = min(bytes_, 8)
            values = state.memory.load(source(lanes[wanted]), width, bytes_ // width, where)
            data[wanted] = np.ascontiguousarray(values).view(np.uint8)
        state.copies.start(lanes, flat, data)

    return run


def commit(state: State, _: Instruction) -> Action:
    """Make cp.async.commit_group."""
    return state.copies.commit


def wait(state: State, instruction: Instruction) -> Action:
    """Make cp.async.wait_group."""
    keep = instruction.args[0]
    if not isinstance(keep, Integer):
        raise UnsupportedError(str(instruction))
    latest = keep.value
    return lambda lanes: state.copies.wait(lanes, latest)

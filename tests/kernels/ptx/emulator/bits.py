"""Moves, shifts, comparisons and other instructions that need more than one function of their arguments."""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx.emulator.arithmetic import Function, Maker, Step
from tests.kernels.ptx.emulator.instructions import Instruction, Integer, Symbol, UnsupportedError, Vector
from tests.kernels.ptx.emulator.registers import SIZE, UNSIGNED, Registers, items
from tests.kernels.ptx.emulator.rounding import HALVES, Array, widen

U32, U64 = np.uint32, np.uint64

COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip

LOGIC: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def move(registers: Registers, instruction: Instruction) -> Step:
    """Make a move, also one that packs or unpacks several registers."""
    kind, (to, source) = instruction.mods[0], instruction.args
    if isinstance(to, Vector):
        return _unpack(registers, instruction)
    target = registers.target(to, kind)
    if isinstance(source, Vector):
        part = UNSIGNED[SIZE[kind] // len(source.items)]
        into = target.view(part).reshape(-1, len(source.items))
        sources = [registers.source(item, f"b{8 * into.itemsize}") for item in source.items]

        def pack() -> None:
            for index, value in enumerate([value.copy() for value in sources]):
                into[:, index] = value

        return Step(pack, [target])
    value = registers.source(source, kind)
    return Step(lambda: np.copyto(target, value, casting="unsafe"), [target])


def _unpack(registers: Registers, instruction: Instruction) -> Step:
    kind, (to, source) = instruction.mods[0], instruction.args
    wanted = [None if isinstance(item, Symbol) else registers.raw(item) for item in items(to)]
    part = UNSIGNED[SIZE[kind] // len(wanted)]
    value = registers.source(source, kind)

    def unpack() -> None:
        pieces = value.view(part).reshape(-1, len(wanted))
        for index, target in enumerate(wanted):
            if target is not None:
                np.copyto(target, pieces[:, index], casting="unsafe")

    return Step(unpack, [target for target in wanted if target is not None])


def convert_address(registers: Registers, instruction: Instruction) -> Step:
    """Make cvta: addresses of all spaces are the same here."""
    kind = instruction.mods[-1]
    target, source = registers.target(instruction.args[0], kind), registers.source(instruction.args[1], kind)
    return Step(lambda: np.copyto(target, source), [target])


def shift(registers: Registers, instruction: Instruction) -> Step:
    """Make shl or shr; a shift by the width or more leaves zeros, or the sign."""
    kind = instruction.mods[0]
    bits = 8 * SIZE[kind]
    target, value = registers.target(instruction.args[0], kind), registers.source(instruction.args[1], kind)
    amount = registers.source(instruction.args[2], "u32")
    function = np.left_shift if instruction.name == "shl" else np.right_shift
    if isinstance(instruction.args[2], Integer) and instruction.args[2].value < bits:
        constant = value.dtype.type(instruction.args[2].value)
        return Step(lambda: function(value, constant, out=target), [target])

    def run() -> None:
        within = function(value, np.minimum(amount, bits - 1).astype(value.dtype))
        np.copyto(target, within if kind[0] == "s" else np.where(amount < bits, within, 0), casting="unsafe")

    return Step(run, [target])


def funnel(registers: Registers, instruction: Instruction) -> Step:
    """Make shf: a shift of two registers side by side."""
    target, low, high, amount = (registers.source(arg, "b32") for arg in instruction.args)
    left, wrap = instruction.mods[0] == "l", instruction.mods[1] == "wrap"

    def run() -> None:
        both = (high.astype(U64) << U64(32)) | low
        by = (amount & U32(31) if wrap else np.minimum(amount, U32(32))).astype(U64)
        np.copyto(target, ((both << by) >> U64(32) if left else both >> by) & U64(0xFFFFFFFF), casting="unsafe")

    return Step(run, [target])


def three_inputs(registers: Registers, instruction: Instruction) -> Step:
    """Make lop3: any function of three bits, by its table."""
    target, a, b, c = (registers.source(arg, "b32") for arg in instruction.args[:4])
    table = instruction.args[4]
    if not isinstance(table, Integer):
        raise UnsupportedError(str(instruction))
    if table.value == 0xEA:
        return Step(lambda: np.copyto(target, (a & b) | c), [target])
    minterms = [index for index in range(8) if table.value >> index & 1]

    def run() -> None:
        result = np.zeros_like(target)
        for index in minterms:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        target[:] = result

    return Step(run, [target])


def permute(registers: Registers, instruction: Instruction) -> Step:
    """Make prmt: each byte of the result is one of eight, or the sign of one."""
    if instruction.mods != ["b32"]:
        raise UnsupportedError(str(instruction))
    target, a, b, selector = (registers.full(arg, "b32") for arg in instruction.args)

    def run() -> None:
        bytes_ = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], axis=1)
        choice = (selector[:, None] >> np.arange(0, 16, 4, dtype=U32)) & 15
        found = np.take_along_axis(bytes_, (choice & 7).astype(np.int64), axis=1)
        signs = np.where(found & 0x80, 255, 0)
        target[:] = np.where(choice & 8, signs, found).astype(np.uint8).view(U32)[:, 0]

    return Step(run, [target])


def dot_bytes(registers: Registers, instruction: Instruction) -> Step:
    """Make dp4a: four products of bytes, and a sum that wraps around."""
    if instruction.mods != ["u32", "u32"]:
        raise UnsupportedError(str(instruction))
    target, a, b, c = (registers.full(arg, "b32") for arg in instruction.args)

    def run() -> None:
        left, right = (np.ascontiguousarray(value).view(np.uint8).reshape(-1, 4).astype(U32) for value in (a, b))
        target[:] = (left * right).sum(axis=1, dtype=U32) + c

    return Step(run, [target])


def extract(registers: Registers, instruction: Instruction) -> Step:
    """Make bfe: a field of bits, with its sign or with zeros before it."""
    kind = instruction.mods[0]
    if kind not in ("u32", "s32"):
        raise UnsupportedError(str(instruction))
    target, value = registers.target(instruction.args[0], kind), registers.source(instruction.args[1], kind)
    position, length = (registers.source(arg, "u32") for arg in instruction.args[2:])

    def run() -> None:
        first = np.minimum(position & U32(255), 63).astype(np.int64)
        count = np.minimum(length & U32(255), 32).astype(np.int64)
        field = (value.astype(np.int64) >> first) & ((np.int64(1) << count) - 1)
        negative = (kind == "s32") & (count > 0) & (field >> np.maximum(count - 1, 0) & 1 == 1)
        np.copyto(target, np.where(negative, field - (np.int64(1) << count), field), casting="unsafe")

    return Step(run, [target])


def compare(registers: Registers, instruction: Instruction) -> Step:
    """Make setp, also with a second predicate and with a third one to combine with."""
    kind, name = instruction.mods[-1], instruction.mods[0]
    first, *second = items(instruction.args[0])
    target = registers.target(first, "pred")
    other = [registers.target(item, "pred") for item in second if not isinstance(item, Symbol)]
    a, b = (registers.source(arg, kind) for arg in instruction.args[1:3])
    value = _comparison(name, kind)
    combine = next((LOGIC[mod] for mod in instruction.mods if mod in LOGIC), None)
    third = registers.source(instruction.args[3], "pred") if combine is not None else None

    def run() -> None:
        result = value(a, b)
        opposite = ~result
        if combine is not None:
            result, opposite = combine(result, third), combine(opposite, third)
        for array in other:
            np.copyto(array, opposite)
        np.copyto(target, result)

    return Step(run, [target, *other])


def _comparison(name: str, kind: str) -> Function:
    """Return a comparison; of floats, those that end in u are true if one of them is not a number."""
    if "f" not in kind:
        return COMPARE[name]
    if name not in COMPARE and name.removesuffix("u") not in COMPARE:
        raise UnsupportedError(f"setp.{name}.{kind}")

    def floats(a: Array, b: Array) -> Array:
        x, y = (widen(v, kind) if kind in HALVES else v for v in (a, b))
        unordered = np.isnan(x) | np.isnan(y)
        if name in COMPARE:
            return np.logical_and(COMPARE[name](x, y), ~unordered)
        return np.logical_or(COMPARE[name.removesuffix("u")](x, y), unordered)

    return floats


def select(registers: Registers, instruction: Instruction) -> Step:
    """Make selp: one of two values by a predicate."""
    kind = instruction.mods[0]
    target = registers.target(instruction.args[0], kind)
    a, b = (registers.source(arg, kind) for arg in instruction.args[1:3])
    chosen = registers.source(instruction.args[3], "pred")
    return Step(lambda: np.copyto(target, np.where(chosen, a, b)), [target])


def count_ones(registers: Registers, instruction: Instruction) -> Step:
    """Make popc."""
    target = registers.target(instruction.args[0], "u32")
    source = registers.source(instruction.args[1], instruction.mods[0])
    return Step(lambda: np.copyto(target, np.bitwise_count(source), casting="unsafe"), [target])


MAKERS: dict[str, Maker] = {
    "mov": move, "cvta": convert_address, "shl": shift, "shr": shift, "shf": funnel, "lop3": three_inputs,
    "prmt": permute, "bfe": extract, "setp": compare, "selp": select, "popc": count_ones,
    "dp4a": dot_bytes,
}  # fmt: skip

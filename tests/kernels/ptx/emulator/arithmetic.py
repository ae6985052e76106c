"""Arithmetic instructions: one table per family, from an opcode to what makes a step of it.

A step computes all threads; the machine puts back those that were not to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np

from tests.kernels.ptx.emulator.instructions import Instruction, UnsupportedError
from tests.kernels.ptx.emulator.registers import SIZE, UNSIGNED, Registers
from tests.kernels.ptx.emulator.rounding import HALVES, Array, from_bf16, fused, narrow, to_bf16, two_sum, widen


@dataclass(frozen=True)
class Step:
    """One instruction for all threads.

    Attributes:
        run: a function that computes and writes the registers.
        targets: the registers that it writes.
    """

    run: Callable[[], None]
    targets: list[Array]


Maker = Callable[[Registers, Instruction], Step]
Function = Callable[..., Array]

REFUSED = {"sat", "cc", "rz", "rm", "rp", "relu", "satfinite", "NaN"}
"""Modifiers that change the arithmetic and that the tables do not know."""


def minus(a: Array, b: Array) -> Array:
    """Return a − b in float64, rounded to odd."""
    return two_sum(a, -b)


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Return a·b + c, which wraps around."""
    return np.add(a * b, c)


def remainder(a: Array, b: Array) -> Array:
    """Return the remainder with the dividend's sign."""
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def quotient(a: Array, b: Array) -> Array:
    """Return the quotient, rounded towards zero."""
    wide, by = a.astype(np.int64), np.where(b == 0, 1, b.astype(np.int64))
    found = np.abs(wide) // np.abs(by)
    return np.where((wide < 0) != (by < 0), -found, found)


INTEGERS: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": multiply_add, "neg": np.negative, "abs": np.abs,
    "min": np.minimum, "max": np.maximum, "div": quotient, "rem": remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip

PREDICATES: dict[str, Function] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not,
}  # fmt: skip

FLOATS: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "min": np.fmin, "max": np.fmax,
}  # fmt: skip
"""Functions whose float32 result numpy rounds once."""

WIDE_FLOATS: dict[str, Function] = {
    "fma": fused, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "tanh": np.tanh,
}  # fmt: skip
"""Functions that are computed in float64 and rounded once; the approximate ones are exact here."""

PACKED_FLOATS: dict[str, Function] = {
    "add": two_sum, "sub": minus, "mul": np.multiply, "fma": fused, "neg": np.negative, "abs": np.abs,
    "min": np.fmin, "max": np.fmax,
}  # fmt: skip
"""Functions of float64 for types of 16 bits, singly or in pairs, and for pairs of float32; rounded once."""

EXTREMES = (np.fmin, np.fmax)
"""Functions that newer architectures have for three arguments too."""

WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def arithmetic(registers: Registers, instruction: Instruction) -> Step | None:
    """Return the step of an instruction that computes each thread from its own registers; None if there is no row.

    Raises:
        UnsupportedError: there is a row, but not for these modifiers or types.
    """
    mods = instruction.mods
    if not mods:
        return None
    kind = mods[-1]
    base = kind.removesuffix("x2")
    make: Maker | None = None
    if kind == "pred" and instruction.name in PREDICATES:
        make = plain(PREDICATES[instruction.name])
    elif kind in HALVES and "f32" in mods and instruction.name in ("add", "sub", "fma"):
        make = mixed(PACKED_FLOATS[instruction.name])
    elif (base in HALVES or kind == "f32x2") and instruction.name in PACKED_FLOATS:
        make = half_fma if instruction.name == "fma" and base == "bf16" else packed(PACKED_FLOATS[instruction.name])
    elif kind == "f32" and instruction.name in WIDE_FLOATS:
        make = wide(WIDE_FLOATS[instruction.name])
    elif kind == "f32" and instruction.name in FLOATS:
        make = plain(FLOATS[instruction.name])
    elif kind[0] in "sub" and base not in HALVES and instruction.name in INTEGERS:
        make = integer(instruction)
    if make is None:
        return None
    refused = REFUSED if "approx" in mods else REFUSED | {"ftz"}
    if refused & set(mods):
        raise UnsupportedError(str(instruction))
    return make(registers, instruction)


def integer(instruction: Instruction) -> Maker:
    """Return what makes an integer instruction: of one size, with a wide result, or with the high half of one."""
    function = INTEGERS[instruction.name]
    if "wide" in instruction.mods:
        return widening(function)
    if "hi" in instruction.mods:
        return high_half
    return plain(function)


def plain(function: Function) -> Maker:
    """Return what makes a step of a function that keeps its arguments' type."""

    def make(registers: Registers, instruction: Instruction) -> Step:
        kind = instruction.mods[-1]
        target = registers.target(instruction.args[0], kind)
        sources = [registers.source(arg, kind) for arg in instruction.args[1:]]
        if isinstance(function, np.ufunc) and function.nin == len(sources):
            return Step(lambda: function(*sources, out=target), [target])
        if isinstance(function, np.ufunc):
            if function not in EXTREMES:
                raise UnsupportedError(str(instruction))
            return Step(lambda: np.copyto(target, reduce(function, sources)), [target])
        return Step(lambda: np.copyto(target, function(*sources), casting="unsafe"), [target])

    return make


def widening(function: Function) -> Maker:
    """Return what makes a step whose product has twice the bits; a third argument has them too."""

    def make(registers: Registers, instruction: Instruction) -> Step:
        kind = instruction.mods[-1]
        target = registers.target(instruction.args[0], WIDER[kind])
        factors = [registers.source(arg, kind) for arg in instruction.args[1:3]]
        terms = [registers.source(arg, WIDER[kind]) for arg in instruction.args[3:]]

        def run() -> None:
            np.copyto(target, function(*(factor.astype(target.dtype) for factor in factors), *terms))

        return Step(run, [target])

    return make


def high_half(registers: Registers, instruction: Instruction) -> Step:
    """Make a multiplication that keeps the upper 32 bits of 64."""
    kind = instruction.mods[-1]
    if instruction.name != "mul" or kind not in ("s32", "u32"):
        raise UnsupportedError(str(instruction))
    target, *factors = (registers.source(arg, kind) for arg in instruction.args)
    dtype = np.int64 if kind == "s32" else np.uint64

    def run() -> None:
        a, b = (factor.astype(dtype) for factor in factors)
        np.copyto(target, a * b >> dtype(32), casting="unsafe")

    return Step(run, [target])


def wide(function: Function) -> Maker:
    """Return what makes a float32 step that is computed in float64."""

    def make(registers: Registers, instruction: Instruction) -> Step:
        target = registers.target(instruction.args[0], "f32")
        sources = [registers.source(arg, "f32") for arg in instruction.args[1:]]

        def run() -> None:
            np.copyto(target, function(*(source.astype(np.float64) for source in sources)).astype(np.float32))

        return Step(run, [target])

    return make


def _words(registers: Registers, instruction: Instruction) -> list[Array]:
    """Return all operands as arrays of bits, two elements for each thread if they come in pairs."""
    kind = instruction.mods[-1]
    register, element = f"b{8 * SIZE[kind]}", UNSIGNED[SIZE[kind.removesuffix("x2")]]
    return [registers.full(arg, register).view(element) for arg in instruction.args]


def packed(function: Function) -> Maker:
    """Return what makes a step that is computed in float64, also on pairs."""

    def make(registers: Registers, instruction: Instruction) -> Step:
        kind = instruction.mods[-1].removesuffix("x2")
        target, *sources = _words(registers, instruction)

        def run() -> None:
            target[:] = narrow(function(*(widen(source, kind).astype(np.float64) for source in sources)), kind)

        return Step(run, [registers.raw(instruction.args[0])])

    return make


def mixed(function: Function) -> Maker:
    """Return what makes a float32 step whose operands are of 16 bits, except for the last one."""

    def make(registers: Registers, instruction: Instruction) -> Step:
        kind = instruction.mods[-1]
        target = registers.target(instruction.args[0], "f32")
        narrower = [registers.full(arg, "b16") for arg in instruction.args[1:-1]]
        last = registers.full(instruction.args[-1], "f32")

        def run() -> None:
            values = [*(widen(source, kind) for source in narrower), last]
            np.copyto(target, function(*(value.astype(np.float64) for value in values)).astype(np.float32))

        return Step(run, [target])

    return make


def half_fma(registers: Registers, instruction: Instruction) -> Step:
    """Make a bfloat16 fma, which is most of what the kernels do, with a short way.

    The product is exact in float32. Where the float32 sum is a bfloat16, rounding the exact sum gives the same.
    """
    target, *sources = _words(registers, instruction)

    def run() -> None:
        a, b, c = (from_bf16(source) for source in sources)
        total = a * b + c
        bits = total.view(np.uint32)
        if (bits & 0xFFFF).any() or not np.isfinite(total).all():
            target[:] = to_bf16(fused(*(value.astype(np.float64) for value in (a, b, c))))
        else:
            np.copyto(target, bits >> 16, casting="unsafe")

    return Step(run, [registers.raw(instruction.args[0])])

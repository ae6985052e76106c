"""cvt: from one type to another, where a register may be wider than the type that it holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.emulator.arithmetic import REFUSED, Step
from tests.kernels.ptx.emulator.instructions import Instruction, UnsupportedError
from tests.kernels.ptx.emulator.registers import SIZE, TYPES, UNSIGNED, Registers
from tests.kernels.ptx.emulator.rounding import HALVES, Array, from_bf16, narrow

FLOATS = (*HALVES, "f32", "f64")
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
Convert = Callable[[Array], Array]


def convert(registers: Registers, instruction: Instruction) -> Step:
    """Make cvt.

    Raises:
        UnsupportedError: these types or modifiers are unknown.
    """
    mods, source, target = instruction.mods, instruction.mods[-1], instruction.mods[-2]
    if (REFUSED | {"ftz"}) & set(mods):
        raise UnsupportedError(str(instruction))
    if target.endswith("x2"):
        return _pair(registers, instruction, target.removesuffix("x2"))
    function = _function(instruction, source, target)
    raw, out = registers.raw(instruction.args[1]), registers.raw(instruction.args[0])

    def run() -> None:
        _write(out, function(_read(raw, source)), target)

    return Step(run, [out])


def _pair(registers: Registers, instruction: Instruction, kind: str) -> Step:
    """Make a conversion of two float32; the first operand becomes the upper half."""
    if "rn" not in instruction.mods or instruction.mods[-1] != "f32":
        raise UnsupportedError(str(instruction))
    target = registers.raw(instruction.args[0])
    upper, lower = (registers.full(arg, "f32") for arg in instruction.args[1:])
    words = target.view(np.uint16).reshape(-1, 2)

    def run() -> None:
        words[:, 0], words[:, 1] = narrow(lower, kind), narrow(upper, kind)

    return Step(run, [target])


def _function(instruction: Instruction, source: str, target: str) -> Convert:
    """Return the conversion of values, which leaves bits of the target's type or values of it."""
    rounding = next((mod for mod in instruction.mods[:-2] if mod.startswith("r")), None)
    if target in HALVES and rounding == "rn":
        return lambda value: narrow(value if value.dtype == np.float32 else value.astype(np.float64), target)
    if target in FLOATS and rounding in (None, "rn") and target not in HALVES:
        return lambda value: value.astype(TYPES[target])
    if source in FLOATS and rounding in TO_INTEGER and target not in FLOATS:
        return lambda value: _to_integer(TO_INTEGER[rounding](value.astype(np.float64)), target)
    if source not in FLOATS and target not in FLOATS:
        return lambda value: value.astype(TYPES[target])
    raise UnsupportedError(str(instruction))


def _to_integer(value: Array, target: str) -> Array:
    """Return whole numbers within the range of an integer type; what is no number becomes 0."""
    range_ = np.iinfo(TYPES[target])
    most = float(range_.max) if range_.bits < 64 else float(2**62)
    return np.clip(np.nan_to_num(value, posinf=most), float(range_.min), most).astype(TYPES[target])


def _read(raw: Array, kind: str) -> Array:
    """Return what a register holds, as a value of the type."""
    width = SIZE[kind]
    if raw.itemsize < width:
        raise UnsupportedError(f"a register of {raw.itemsize} bytes as {kind}")
    if raw.itemsize > width:
        raw = (raw & raw.dtype.type(2 ** (8 * width) - 1)).astype(UNSIGNED[width])
    return from_bf16(raw) if kind == "bf16" else raw.view(TYPES[kind])


def _write(out: Array, value: Array, kind: str) -> None:
    """Write a value, which a wider register extends by its sign or by zeros."""
    if np.dtype(TYPES[kind]).kind == "i":
        value = value.astype(np.int64)
    elif np.dtype(TYPES[kind]).kind == "f":
        value = value.view(UNSIGNED[SIZE[kind]])
    np.copyto(out, value, casting="unsafe")

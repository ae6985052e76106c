"""wgmma: products of four warps, with operands in shared memory, that run while the warps go on."""

from __future__ import annotations

import re

import numpy as np

from tests.kernels.ptx.emulator import fragments
from tests.kernels.ptx.emulator.findings import Findings, Kind
from tests.kernels.ptx.emulator.instructions import (
    Address,
    Block,
    Instruction,
    Integer,
    Operand,
    Register,
    UnsupportedError,
    Vector,
)
from tests.kernels.ptx.emulator.matrices import matched
from tests.kernels.ptx.emulator.registers import items
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.state import Action, State, together

WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
WARPS, ROWS, INNER = 4, 64, 16
PITCH = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes in which rows are swizzled, by the descriptor's mode; 0 is none."""


def order(_: State, instruction: Instruction) -> Action:
    """Make wgmma.fence, commit_group and wait_group; :func:`check_block` sees what they order."""

    def run(lanes: Array) -> None:
        together(lanes, instruction, WARPS)

    return run


def multiply(state: State, instruction: Instruction) -> Action:
    """Make wgmma.mma_async, at once; :func:`check_block` sees who touches its registers too early."""
    match = matched(WGMMA, instruction)
    columns, kind = int(match[1]), match[2]
    registers, (to, first, second, keep, *flags) = state.registers, instruction.args
    numbers = [flag.value for flag in flags if isinstance(flag, Integer)]
    if len(numbers) != len(flags) or numbers[:2] != [1, 1]:
        raise UnsupportedError(str(instruction))
    targets = [registers.target(item, "f32") for item in items(to)]
    held = [registers.full(item, "b32") for item in first.items] if isinstance(first, Vector) else None
    described = registers.full(first, "b64") if held is None else np.zeros(0, np.uint64)
    right, kept = registers.full(second, "b64"), registers.full(keep, "pred")
    transposed = [*([0] if held is not None else []), *numbers[2:], 0, 0][:2]

    def run(lanes: Array) -> None:
        groups = together(lanes, instruction, WARPS)
        if (kept[groups] != kept[groups[:, :1]]).any():
            raise UnsupportedError(f"{instruction}: threads differ about the accumulator")
        b = operand(state, groups, right, (columns, INNER, transposed[1]), instruction).transpose(0, 2, 1)
        if held is not None:
            a = fragments.left([register[lanes] for register in held]).reshape(-1, ROWS, INNER)
        else:
            a = operand(state, groups, described, (ROWS, INNER, transposed[0]), instruction)
        total = fragments.accumulator([register[lanes] for register in targets]).reshape(-1, ROWS, columns)
        total = np.where(kept[groups[:, 0]][:, None, None], total, np.float32(0))
        result = fragments.scattered(fragments.product(total, a, b, kind).reshape(-1, ROWS // WARPS, columns))
        for index, target in enumerate(targets):
            target[lanes] = result[:, index]

    return run


def operand(
    state: State, groups: Array, descriptors: Array, shape: tuple[int, int, int], instruction: Instruction
) -> Array:
    """Return the operand of every warpgroup from shared memory, uint16 [groups, rows, columns].

    Args:
        state: what the kernel runs on.
        groups: the threads, [groups, 128].
        descriptors: every thread's descriptor of the operand.
        shape: rows, columns, and whether they are stored transposed.
        instruction: the instruction that reads.

    Raises:
        UnsupportedError: the threads' descriptors differ, or use what Triton does not.
    """
    own = descriptors[groups]
    modes = own[:, 0] >> np.uint64(62)
    if (own != own[:, :1]).any() or (own >> np.uint64(49) & np.uint64(7)).any() or (modes != modes[0]).any():
        raise UnsupportedError(f"{instruction}: descriptor {int(own[0, 0]):#x}")
    start, leading, stride = (
        ((own[:, 0] >> np.uint64(shift) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)[:, None, None]
        for shift in (0, 16, 32)
    )
    address = start + places(shape, PITCH[int(modes[0])], leading, stride)
    if pitch := PITCH[int(modes[0])] * bool(modes[0]):
        address = address ^ ((address >> 7 & (pitch // 16 - 1)) << 4)
    flat = address.reshape(len(groups), -1)
    return state.shared.operand(groups[:, 0], flat, str(instruction), "operand").reshape(address.shape)


def places(shape: tuple[int, int, int], pitch: int, leading: Array, stride: Array) -> Array:
    """Return the bytes from the operand's start to each element, before swizzling."""
    rows, columns, transposed = shape
    i, k = np.arange(rows)[None, :, None], np.arange(columns)[None, None, :]
    found: Array
    if pitch == PITCH[0]:
        inner = i % 8 * 2 + k % 8 * 16 if transposed else i % 8 * 16 + k % 8 * 2
        found = inner + i // 8 * stride + k // 8 * leading
    elif transposed:
        wide = pitch // 2
        found = i // wide * leading + i % wide * 2 + k % 8 * pitch + k // 8 * stride
    else:
        found = i // 8 * stride + i % 8 * pitch + k * 2
    return found


def _names(operand: Operand) -> set[str]:
    if isinstance(operand, Vector):
        return {name for item in operand.items for name in _names(item)}
    if isinstance(operand, Address):
        return _names(operand.base)
    return {operand.name} if isinstance(operand, Register) else set()


def check_block(block: Block, findings: Findings) -> None:
    """Check that a block leaves the registers of a wgmma alone from wgmma.fence until its wait."""
    written: set[str] = set()
    results: set[str] = set()
    operands: set[str] = set()
    for instruction in block.instructions:
        op, args = instruction.op, instruction.args
        if op.startswith("wgmma.fence"):
            written.clear()
        elif op.startswith("wgmma.wait_group"):
            if args[0] == Integer(0):
                results.clear()
                operands.clear()
        elif op.startswith("wgmma.mma_async"):
            mine = _names(args[0]), _names(args[1]) if isinstance(args[1], Vector) else set()
            if bad := written & (mine[0] | mine[1]):
                findings.add(Kind.WGMMA_OPERAND, str(instruction), ", ".join(sorted(bad)))
            results |= mine[0]
            operands |= mine[1]
        elif not op.startswith("wgmma"):
            used = {name for arg in args for name in _names(arg)}
            made = _names(args[0]) if args and not op.startswith(("st.", "cp.async", "red.", "bar", "bra")) else set()
            written |= made
            if bad := (used & results) | (made & operands):
                findings.add(Kind.WGMMA_IN_FLIGHT, str(instruction), ", ".join(sorted(bad)))

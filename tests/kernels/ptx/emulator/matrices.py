"""Matrix instructions of one warp: mma, ldmatrix, stmatrix."""

from __future__ import annotations

import re

import numpy as np

from tests.kernels.ptx.emulator import fragments
from tests.kernels.ptx.emulator.instructions import Instruction, UnsupportedError
from tests.kernels.ptx.emulator.registers import PER_WARP, items
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.state import Action, State, address_of, together

MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16)\.\2\.f32")
MATRIX = re.compile(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
ROW = 8
"""16-bit values in a row of 16 bytes, and rows of a matrix."""


def matched(pattern: re.Pattern[str], instruction: Instruction) -> re.Match[str]:
    """Return the opcode's parts.

    Raises:
        UnsupportedError: the opcode is another one.
    """
    match = pattern.fullmatch(instruction.op)
    if match is None:
        raise UnsupportedError(str(instruction))
    return match


def multiply(state: State, instruction: Instruction) -> Action:
    """Make mma: a product of matrices in registers."""
    match = matched(MMA, instruction)
    kind, inner = match[2], int(match[1])
    registers = state.registers
    targets = [registers.target(item, "f32") for item in items(instruction.args[0])]
    a, b = ([registers.full(item, "b32") for item in items(arg)] for arg in instruction.args[1:3])
    c = [registers.full(item, "f32") for item in items(instruction.args[3])]
    if (len(targets), len(a), len(b), len(c)) != (4, inner // 4, inner // 8, 4):
        raise UnsupportedError(str(instruction))

    def run(lanes: Array) -> None:
        together(lanes, instruction)
        total = fragments.accumulator([register[lanes] for register in c])
        rows = fragments.left([register[lanes] for register in a])
        columns = fragments.right([register[lanes] for register in b])
        result = fragments.scattered(fragments.product(total, rows, columns, kind))
        for index, target in enumerate(targets):
            target[lanes] = result[:, index]

    return run


def load_matrix(state: State, instruction: Instruction) -> Action:
    """Make ldmatrix: one to four matrices of 8×8, whose rows lie where the first threads say."""
    match = matched(MATRIX, instruction)
    count, transposed = int(match[1]), bool(match[2])
    targets = [state.registers.raw(item) for item in items(instruction.args[0])]
    address = address_of(state, instruction.args[1], np.uint32)

    def run(lanes: Array) -> None:
        own = together(lanes, instruction)[:, : ROW * count].ravel()
        data = state.shared.load(own, address(own), 2, ROW, str(instruction)).reshape(-1, count, ROW, ROW)
        if transposed:
            data = data.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(data).reshape(-1, count, PER_WARP, 2).view(np.uint32)[..., 0]
        for index, target in enumerate(targets):
            target[lanes] = words[:, index].ravel()

    return run


def store_matrix(state: State, instruction: Instruction) -> Action:
    """Make stmatrix, the inverse of ldmatrix."""
    match = matched(MATRIX, instruction)
    count, transposed = int(match[1]), bool(match[2])
    address = address_of(state, instruction.args[0], np.uint32)
    sources = [state.registers.full(item, "b32") for item in items(instruction.args[1])]

    def run(lanes: Array) -> None:
        own = together(lanes, instruction)[:, : ROW * count].ravel()
        words = np.stack([source[lanes].reshape(-1, PER_WARP) for source in sources], 1)
        data = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, ROW, ROW)
        if transposed:
            data = np.ascontiguousarray(data.transpose(0, 1, 3, 2))
        state.shared.store(own, address(own), data.reshape(-1, ROW), str(instruction))

    return run

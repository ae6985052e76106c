"""The table of instructions that touch memory, or that threads do together."""

from __future__ import annotations

from tests.kernels.ptx.emulator import matrices, transfers, warpgroups, warps
from tests.kernels.ptx.emulator.instructions import Instruction
from tests.kernels.ptx.emulator.rounding import Array
from tests.kernels.ptx.emulator.state import Action, MakeAction, State


def fence(state: State, _: Instruction) -> Action:
    """Make fence.proxy.async: wgmma sees what was written before."""
    return state.shared.fence


def nothing(_state: State, _instruction: Instruction) -> Action:
    """Make an instruction that changes only timing, or an order that holds here anyway."""

    def run(_: Array) -> None:
        return

    return run


ACTIONS: dict[str, MakeAction] = {
    "ld": transfers.load,
    "st": transfers.store,
    "atom": transfers.atomic,
    "red": transfers.atomic,
    "cp.async.ca": transfers.start_copy,
    "cp.async.cg": transfers.start_copy,
    "cp.async.commit_group": transfers.commit,
    "cp.async.wait_group": transfers.wait,
    "shfl": warps.shuffle,
    "redux": warps.reduce,
    "vote": warps.ballot,
    "elect": warps.elect,
    "mma": matrices.multiply,
    "ldmatrix": matrices.load_matrix,
    "stmatrix": matrices.store_matrix,
    "wgmma.mma_async": warpgroups.multiply,
    "wgmma.fence": warpgroups.order,
    "wgmma.commit_group": warpgroups.order,
    "wgmma.wait_group": warpgroups.order,
    "fence.proxy.async": fence,
    "bar.warp.sync": nothing,
    "griddepcontrol": nothing,
}
"""What makes an instruction, by the beginning of its opcode."""


def action(state: State, instruction: Instruction) -> Action | None:
    """Return the action of an instruction, or None if the table has none."""
    mods = instruction.op.replace("::", ".").split(".")
    for length in range(len(mods), 0, -1):
        if make := ACTIONS.get(".".join(mods[:length])):
            return make(state, instruction)
    return None

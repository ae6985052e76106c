"""The cases of both tiers, from which the table of errors is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tests.kernels.layers import KINDS
from tests.kernels.ptx.cases import Case
from vllm_moeq.kernels.triton.schedule import FEW, MANY, SHARED_BYTES, Block, Schedule

MIXED = (1, 2, 3, 4, 8)
SHAPES = {
    (1,) * 4: (256, 192, 64, 0), (2,) * 4: (320, 96, -1, 0), (3,) * 4: (512, 160, 128, 32), (4,) * 4: (288, 128, 32, 0),
    (8,) * 4: (448, 320, 64, 0), MIXED: (512, 384, 128, 0),
}  # fmt: skip
"""Widths of the experts, and a shape for each: even and odd numbers of tiles, blocks with and without padding."""


SMALL = (256, 96, 32, 0)
"""Three tiles of gate and up: an odd number."""

EVERY_RUN = (
    Case("sm_80", "bf16", (1, 1, 1), SMALL, tokens=2, schedule=FEW[0]),
    Case("sm_90", "bf16", (4, 4, 4), SMALL, tokens=5, schedule=FEW[1]),
    Case("sm_80", "fp16", (8, 4, 8), SMALL, tokens=5, schedule=FEW[2]),
    Case("sm_90", "fp16", (2, 2, 2, 2), SMALL, tokens=9, routing="half local", schedule=FEW[3]),
    Case("sm_90", "bf16", (3, 3, 3), SMALL, tokens=17, schedule=MANY[0]),
    Case("sm_80", "fp16", (4, 4, 4, 4), SMALL, tokens=33, routing="padding rows", schedule=MANY[1]),
    Case("sm_90", "bf16", (3, 3, 3), SMALL, tokens=100, routing="first and last", schedule=MANY[2]),
)
"""Every schedule on one architecture; compiling takes most of the time."""

WIDE = (
    Case("sm_80", "bf16", (2, 3), (1024, 96, 128, 0), tokens=2),
    Case("sm_90", "fp16", (1, 2), (3328, 32, 64, 0), tokens=1, top_k=1),
    Case("sm_80", "bf16", (2, 2), (3328, 32, 64, 0), tokens=1, top_k=1, rings=(0, 1), rotations=(128, 0)),
)
"""A block of the inputs for each of the four slices, and thirteen blocks: buffers are used again."""

TRELLISES = (
    Case("sm_80", "bf16", (2, 2, 2), SMALL, tokens=2, rings=(0, 1, 2), rotations=(128, 32)),
    Case("sm_90", "fp16", (2, 3, 2, 3), SMALL, tokens=9, rings=(0, 2), rotations=(64, 0)),
    Case("sm_90", "bf16", (2, 2, 3), SMALL, tokens=33, rings=(0, 1), rotations=(128, 32)),
)
"""Trellises alone and beside the grid, in rotated layers."""


ACTIVATIONS = (
    Case("sm_80", "bf16", (2, 2, 2), SMALL, tokens=2, kind="gpt_oss"),
    Case("sm_90", "fp16", (3, 3, 3), SMALL, tokens=33, kind="gpt_oss"),
    Case("sm_90", "bf16", (2, 2, 2), SMALL, tokens=9, kind="nemotron_h"),
)
"""Bounds, a factor and biases; and no gate."""


def meets(schedule: Schedule, bits: Sequence[int], shape: tuple[int, int, int, int], rings: int = 0) -> bool:
    """Tell whether the schedule's buffers fit for a layer with these widths, as the layer itself asks."""
    group = math.gcd(shape[2], shape[3], 256)
    block = Block(max(bits) + (rings > 0), 4 * 256 // group if shape[2] > 0 else 0)
    return schedule in MANY or (block.planes <= schedule.planes and block.shared_bytes(schedule) <= SHARED_BYTES)


def tokens_of(schedule: Schedule) -> int:
    """Return a number of tokens that the schedule is meant for."""
    return schedule.tokens if schedule in FEW else max(17, schedule.tokens + 1)


def cases(architectures: Sequence[str] = ("sm_80", "sm_89", "sm_90", "sm_120")) -> Iterator[Case]:
    """Yield every schedule with every width and a mixture, in both dtypes; then routings, splits and wide scales."""
    for arch in architectures:
        for dtype in ("bf16", "fp16"):
            for bits, shape in SHAPES.items():
                for schedule in (*FEW, *MANY):
                    if meets(schedule, bits, shape):
                        yield Case(arch, dtype, bits, shape, tokens_of(schedule), schedule=schedule)
        for tokens in (8, 33):
            for routing in ("padding rows", "nothing local", "half local", "one expert", "first and last"):
                yield Case(arch, "bf16", tokens=tokens, routing=routing)
        for splits in (2, 4, 8):
            yield Case(arch, "bf16", shape=(256, 2048, 128, 0), tokens=4, splits=splits)
        yield Case(arch, "bf16", tokens=4, wide_scales=True)
        for kind in KINDS:
            for tokens in (4, 33):
                yield Case(arch, "bf16", (2, 3, 2), SMALL, tokens, kind=kind)
            yield Case(arch, "bf16", shape=(256, 2048, 128, 0), tokens=4, splits=4, kind=kind)
        for dtype in ("bf16", "fp16"):
            for bits, rings in ((1,) * 3, (0, 1, 2)), ((2, 1, 2, 3, 4, 4), (0, 1, 3, 4)), ((3, 8, 4), (0, 2)):
                for schedule in (schedule for schedule in (*FEW, *MANY) if meets(schedule, bits, SMALL, len(rings))):
                    tokens = tokens_of(schedule)
                    yield Case(arch, dtype, bits, SMALL, tokens, schedule=schedule, rings=rings, rotations=(256, 32))

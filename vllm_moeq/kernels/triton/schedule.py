"""The cutting of a layer into programs, depending on the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

FEW_TOKENS = 16
"""Up to this number of tokens, pairs are matched in the kernel instead of sorted."""

SPLIT_CHOICES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Schedule:
    """One compiled variant.

    Attributes:
        tokens: tokens of one expert per program.
        rows: output neurons per program: 64 for few tokens, else a multiple of 64.
        warps: warps per program.
        stages: the depth of the pipeline of loads.
        slices: the blocks of inputs that a program of few tokens takes at a time, a warp or more for each.
        planes: the most planes of words of a block for which the registers suffice.
        registers: the limit of registers per thread. 0 leaves it to ptxas; it sometimes accepts a few bytes of spills
            to fit one more program, and sometimes spills more with more registers.
    """

    tokens: int
    rows: int
    warps: int
    stages: int
    slices: int = 1
    planes: int = 8
    registers: int = 0


@dataclass(frozen=True)
class Block:
    """What a program loads of 64 rows in a block of 256 inputs.

    Attributes:
        planes: the most planes of words; see :func:`vllm_moeq.kernels.triton.codings.planes_in`.
        scales: bytes of a row's scales and zeros.
    """

    planes: int
    scales: int

    def shared_bytes(self, schedule: Schedule) -> int:
        """Return the shared memory that the buffers of a variant for few tokens take."""
        inputs, sums = 256 * 2 * schedule.tokens, 8 * 4 * schedule.tokens
        return schedule.slices * (schedule.stages - 1) * (64 * (16 * 2 * self.planes + self.scales) + inputs + sums)


SHARED_BYTES = 99 << 10
"""Of a program, on the NVIDIA GPUs that have the least."""

SHARED_BYTES_AMD = 56 << 10
"""Of 64 KiB; Triton pads buffers there."""

FEW = (
    Schedule(8, 64, 4, 3, slices=4, planes=3, registers=255),
    Schedule(8, 64, 2, 3, slices=2, planes=5, registers=255),
    Schedule(8, 64, 4, 3, registers=255),
    Schedule(16, 64, 2, 3, registers=255),
)
MANY = (Schedule(16, 64, 4, 3, registers=168), Schedule(32, 64, 4, 3), Schedule(64, 128, 8, 2))


def schedule_few(tokens: int, block: Block, shared: int = SHARED_BYTES) -> Schedule:
    """Return the variant for up to FEW_TOKENS tokens whose registers and shared memory suffice for a layer's blocks.

    If no shared memory suffices, that is the last one for these tokens.
    """
    wide = [choice for choice in FEW if tokens <= choice.tokens and block.planes <= choice.planes]
    wide = [choice for choice in wide if choice.tokens == wide[0].tokens]
    return next((choice for choice in wide if block.shared_bytes(choice) <= shared), wide[-1])


def schedule_many(pairs: int, experts: int) -> Schedule:
    """Return the smallest variant whose tile holds an expert's average number of pairs, or the largest variant."""
    share = pairs / max(experts, 1)
    return next((choice for choice in MANY if share <= choice.tokens), MANY[-1])


def splits_for(programs: int, blocks: int, wanted: int) -> int:
    """Return the largest split that runs at most ``wanted`` programs with at least two blocks each; else 1."""
    fitting = [split for split in SPLIT_CHOICES if split == 1 or (programs * split <= wanted and 2 * split <= blocks)]
    return fitting[-1]


def weighted_splits(bits: list[int], most: int) -> list[int]:
    """Return each expert's number of splits, in proportion to its bytes; the widest gets ``most``."""
    return [max(1, round(most * width / max(bits))) for width in bits]

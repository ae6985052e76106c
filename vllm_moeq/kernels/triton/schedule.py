"""How a layer is cut into programs, by the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

FEW_TOKENS = 16
"""Up to here pairs are matched in the kernel instead of sorted."""

SPLIT_CHOICES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Schedule:
    """One compiled variant.

    Attributes:
        tokens: tokens of one expert per program.
        rows: output neurons per program, a multiple of 64.
        warps: warps per program.
        stages: depth of the pipeline of loads.
        registers: limit per thread, None: ptxas chooses, at times with a few bytes of spills for one more program.
        registers_for_many: the same for more than FEW_WIDTHS widths: their buffers admit fewer programs anyway.
    """

    tokens: int
    rows: int
    warps: int
    stages: int
    registers: int | None = None
    registers_for_many: int | None = None

    def register_limit(self, widths: int) -> int | None:
        """Return the limit per thread for that many widths compiled in."""
        return self.registers_for_many if widths > FEW_WIDTHS and self.registers_for_many else self.registers


FEW_WIDTHS = 3

FEW = (Schedule(8, 64, 2, 3, registers_for_many=192), Schedule(16, 64, 2, 3, registers=255))
MANY = (Schedule(16, 64, 4, 3), Schedule(32, 64, 4, 3), Schedule(64, 128, 8, 2))


def schedule_few(tokens: int) -> Schedule:
    """Return the variant for up to FEW_TOKENS tokens."""
    return next(choice for choice in FEW if tokens <= choice.tokens)


def schedule_many(pairs: int, experts: int) -> Schedule:
    """Return the variant whose tile an expert with a fair share of the pairs about fills."""
    share = pairs / max(experts, 1)
    return next((choice for choice in MANY if share <= choice.tokens), MANY[-1])


def splits_for(programs: int, blocks: int, wanted: int) -> int:
    """Return how often to split the input dimension so that about ``wanted`` programs run, each with work to do."""
    fitting = [split for split in SPLIT_CHOICES if split == 1 or (programs * split <= wanted and 2 * split <= blocks)]
    return fitting[-1]


def weighted_splits(bits: list[int], most: int) -> list[int]:
    """Return splits per expert in proportion to its bytes: the widest gets ``most``."""
    return [max(1, round(most * width / max(bits))) for width in bits]
